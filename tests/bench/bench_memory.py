"""What `sft-train plan` says of memory against what runs need: peak RSS of one and two ranks on a
CPU.

A run of a model of almost no size says what Python and the libraries need; that is subtracted.
malloc is told to give freed pages back at once: otherwise its fragmentation is measured too, up to
a third more. All in fp32, random weights, two micro-batches a step, two steps, the peak taken
before the export.

    python tests/bench/bench_memory.py
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from train.config import TrainConfig
from train.estimate.memory_advice import setup_of
from train.model.model import model_config
from train.recipe_file import load_recipe
from train.sizing.memory import GIB, memory_of
from train.sizing.model_size import model_size

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "builders"))
from shard_sets import random_packs, write_shard_set

from shared.shard_reader import read_manifest

VOCABULARY = 32_000
STEPS = 2
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    hidden: int
    layers: int
    max_seq_len: int
    ranks: int
    checkpointing: bool = False
    tiles: int = 1

    def title(self) -> str:
        extra = ", checkpointing" if self.checkpointing else ""
        extra += f", {self.tiles} tiles" if self.tiles > 1 else ""
        return f"{self.hidden} x {self.layers}, {self.max_seq_len:,} tokens{extra}"


CASES = (
    *(Case(hidden=512, layers=8, max_seq_len=2048, ranks=ranks) for ranks in (1, 2)),
    *(
        Case(hidden=512, layers=8, max_seq_len=2048, ranks=ranks, checkpointing=True)
        for ranks in (1, 2)
    ),
    Case(hidden=1024, layers=4, max_seq_len=512, ranks=1),
    Case(hidden=1024, layers=4, max_seq_len=512, ranks=2),
    Case(hidden=256, layers=12, max_seq_len=4096, ranks=1),
    Case(hidden=256, layers=12, max_seq_len=4096, ranks=1, checkpointing=True, tiles=4),
)


def main() -> None:
    print("| model | ranks | predicted GiB | measured GiB | error |\n|---|---|---|---|---|")
    errors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = {
            ranks: measured(
                folder / f"base-{ranks}", Case(hidden=16, layers=1, max_seq_len=32, ranks=ranks), 64
            )
            for ranks in (1, 2)
        }
        for number, case in enumerate(CASES):
            work = folder / str(number)
            found = measured(work, case, VOCABULARY) - base[case.ranks]
            expected = predicted(work, case)
            errors.append(expected / found - 1)
            print(
                f"| {case.title()} | {case.ranks} | {expected:.2f} | {found:.2f} |"
                f" {errors[-1]:+.0%} |",
                flush=True,
            )
    print(
        f"\nlargest error {max(map(abs, errors)):.0%}; base {base[1]:.2f} GiB on one rank,"
        f" {base[2]:.2f} on two"
    )


def measured(work: Path, case: Case, vocabulary: int) -> float:
    """Train and return the peak of rank 0 in GiB."""
    work.mkdir()
    packs = random_packs(
        num_packs=2 * case.ranks * STEPS, max_seq_len=case.max_seq_len, vocab_size=vocabulary
    )
    write_shard_set(work / "set", packs, max_seq_len=case.max_seq_len, vocab_size=vocabulary)
    (work / "recipe.toml").write_text(recipe(case))
    command = [
        Path(sys.executable).with_name("sft-train"),
        "--shards",
        "set",
        "--recipe",
        "recipe.toml",
    ]
    done = subprocess.run(
        [*command, "--output", "run", "--nproc-per-node", str(case.ranks)],
        cwd=work, env={**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"{case}: sft-train failed:\n{done.stderr[-3000:]}")
    lines = (work / "run" / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["memory_gib"])


def predicted(work: Path, case: Case) -> float:
    """Return what the plan's functions say of the same run, on a CPU and in fp32."""
    config: TrainConfig = load_recipe(str(work / "recipe.toml"))
    manifest = read_manifest(work / "set")
    size = model_size(model_config(config.model, manifest), lora=config.lora, dtype=torch.float32)
    setup = setup_of(
        config, case.max_seq_len, case.ranks, dtype=torch.float32, micro_batches=2, on_gpu=False
    )
    return memory_of(size, setup).total / GIB


def recipe(case: Case) -> str:
    lines = itertools.chain(
        [
            'name = "bench"',
            "[model]",
            f"gradient_checkpointing = {str(case.checkpointing).lower()}",
        ],
        [
            f"mlp_tiles = {case.tiles}",
            "[model.config]",
            'model_type = "llama"',
            f"hidden_size = {case.hidden}",
        ],
        [f"intermediate_size = {case.hidden * 11 // 4}", f"num_hidden_layers = {case.layers}"],
        ["num_attention_heads = 4", "num_key_value_heads = 4", "[optim]", "learning_rate = 1e-4"],
        ["[schedule]", f"max_steps = {STEPS}", "[batch]", f"packs_per_step = {2 * case.ranks}"],
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
