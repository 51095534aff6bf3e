"""The memory that `sft-train plan` predicts against what runs need: peak RSS of one and two ranks
on a CPU.

What Python and the libraries need is measured with a tiny model, and subtracted. malloc is set to
return freed pages at once: otherwise its fragmentation would be measured too, up to a third more.
All runs are in fp32 with random weights, two steps of two micro-batches; the peak is taken before
the export.

    python tests/bench/bench_memory.py
"""

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
        base = {}
        for ranks in (1, 2):
            tiny = Case(hidden=16, layers=1, max_seq_len=32, ranks=ranks)
            base[ranks] = measured(folder / f"base-{ranks}", tiny, 64)
        for number, case in enumerate(CASES):
            work = folder / str(number)
            peak = measured(work, case, VOCABULARY) - base[case.ranks]
            expected = predicted(work, case)
            errors.append(expected / peak - 1)
            print(
                f"| {case.title()} | {case.ranks} | {expected:.2f} | {peak:.2f} |"
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
    command = [Path(sys.executable).with_name("sft-train"), "--shards", "set"]
    command += ["--recipe", "recipe.toml", "--output", "run", "--nproc-per-node", str(case.ranks)]
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{case}: sft-train failed:\n{done.stderr[-3000:]}")
    lines = (work / "run" / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["memory_gib"])


def predicted(work: Path, case: Case) -> float:
    """Return the plan's estimate of the same run, on a CPU and in fp32."""
    config: TrainConfig = load_recipe(str(work / "recipe.toml"))
    manifest = read_manifest(work / "set")
    size = model_size(model_config(config.model, manifest), lora=config.lora, dtype=torch.float32)
    setup = setup_of(
        config, case.max_seq_len, case.ranks, dtype=torch.float32, micro_batches=2, on_gpu=False
    )
    return memory_of(size, setup).total / GIB


def recipe(case: Case) -> str:
    return f"""
name = "bench"
[model]
gradient_checkpointing = {str(case.checkpointing).lower()}
mlp_tiles = {case.tiles}
[model.config]
model_type = "llama"
hidden_size = {case.hidden}
intermediate_size = {case.hidden * 11 // 4}
num_hidden_layers = {case.layers}
num_attention_heads = 4
num_key_value_heads = 4
[optim]
learning_rate = 1e-4
[schedule]
max_steps = {STEPS}
[batch]
packs_per_step = {2 * case.ranks}
"""


if __name__ == "__main__":
    main()
