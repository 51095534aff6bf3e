"""Runs of `sft-train` for tests: in this process where possible, which saves seconds, else as the
installed command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from safetensors.torch import load_file
from shard_sets import random_packs, write_shard_set

VOCAB = 61

RECIPE = """
name = "tiny"
[model.config]
model_type = "llama"
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
attention_dropout = 0.1
[optim]
learning_rate = 3e-3
[schedule]
kind = "cosine"
warmup_ratio = 0.2
epochs = 3
[batch]
packs_per_step = 4
[checkpoint]
every_steps = 2
keep_last = 2
"""


def write_inputs(folder: Path, *, num_packs: int = 10, recipe: str = RECIPE) -> tuple[Path, Path]:
    """Return a shard set and a recipe file in `folder`."""
    packs = random_packs(num_packs=num_packs, max_seq_len=32, vocab_size=VOCAB)
    shards = write_shard_set(folder / "set", packs, max_seq_len=32, vocab_size=VOCAB)
    path = folder / "tiny.toml"
    path.write_text(recipe, encoding="utf-8")
    return shards, path


def train_here(*arguments: object) -> Result:
    """Run `sft-train` in this process."""
    from train.cli.main import cli

    return CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)


def launch_here(*options: object, train: tuple[object, ...] = (), output: str = "run") -> Result:
    """Run `sft-train launch` in this process, for the inputs in the working directory."""
    call = ("--shards", "set", "--recipe", "tiny.toml", "--output", output, *train)
    return train_here("launch", *options, "--", *call)


def command(*arguments: object) -> list[str]:
    """Return the command line of the installed `sft-train`."""
    return [str(Path(sys.executable).with_name("sft-train")), *map(str, arguments)]


def train_apart(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the installed `sft-train` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment, timeout=300
    )


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["train_loss"]) for record in records(run)]


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "model" / "model.safetensors")


def status(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "status.json").read_text())
    return content
