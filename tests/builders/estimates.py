"""Estimates through `sft-train plan`: a Llama of 8B without weights, sizes without shards."""

import json
from pathlib import Path
from typing import Any

from train_runs import train_here

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192,
}  # fmt: skip
STATED = ("--rows", 939_343, "--tokens", 460_000_000, "--loss-tokens", 300_000_000)

RECIPE_8B = """
name = "big"
[model]
name = "model"
[optim]
learning_rate = 1e-5
[batch]
packs_per_step = 16
"""


def write_recipe_8b(folder: Path) -> Path:
    """Return a recipe that names a model of 8B parameters, of which only the config exists."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA))
    (folder / "big.toml").write_text(RECIPE_8B)
    return folder / "big.toml"


def planned(*arguments: object) -> dict[str, Any]:
    """Return what `sft-train plan --json` prints."""
    result = train_here("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    plan: dict[str, Any] = json.loads(result.stdout)
    return plan
