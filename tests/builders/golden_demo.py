"""The recorded demo in tests/golden: the columns of its shard set, and twenty steps of training.

    python tests/builders/golden_demo.py

records both again after a change that was meant to change the numbers; say why in the commit.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from repository import TESTS

GOLDEN = TESTS / "golden"
COLUMNS, LOSSES = GOLDEN / "demo_columns.txt", GOLDEN / "demo_losses.txt"
STEPS = 20
RANKS = (1, 2)
KEYS = ("train_loss", "grad_norm")

# The values of KEYS for each step.
Curve = list[tuple[float, ...]]


def build(shards: Path) -> None:
    _run("sft-prep", "build", "--mixture", "demo", "--out", shards, "--workers", 1, "-q")


def columns_of(shards: Path) -> str:
    """Return the digest of each column; they do not depend on the manifest's keys."""
    manifest = json.loads((shards / "manifest.json").read_text())
    lines = [
        f"{file['sha256']}  {shard['path']}/{name}\n"
        for shard in manifest["shards"]
        for name, file in sorted(shard["files"].items())
    ]
    return "".join(lines)


def train(shards: Path, run: Path, ranks: int) -> Curve:
    """Return the first steps of the recipe on `ranks` ranks, in fp32; two ranks take half a
    micro-batch each."""
    settings = ("--set", "engine.dtype=fp32", "--set", "log.every_steps=1")
    settings += ("--set", f"batch.packs_per_micro_batch={4 // ranks}")
    call = ("--shards", shards, "--output", run, "--nproc-per-node", ranks, "--max-steps", STEPS)
    _run("sft-train", *call, "-q", *settings)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(record[key] for key in KEYS) for record in records if "train_loss" in record]


def losses_as_text(curves: dict[int, Curve]) -> str:
    head = "# ranks step " + " ".join(KEYS)
    lines = [
        f"{ranks} {step} " + " ".join(f"{value:.7f}" for value in values)
        for ranks, curve in curves.items()
        for step, values in enumerate(curve, 1)
    ]
    return "\n".join([head, *lines]) + "\n"


def recorded_losses() -> dict[int, Curve]:
    curves: dict[int, Curve] = {ranks: [] for ranks in RANKS}
    for line in LOSSES.read_text().splitlines()[1:]:
        ranks, _, *values = line.split()
        curves[int(ranks)].append(tuple(map(float, values)))
    return curves


def record() -> None:
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "demo"
        build(shards)
        COLUMNS.write_text(columns_of(shards))
        curves = {ranks: train(shards, Path(name) / f"run-{ranks}", ranks) for ranks in RANKS}
        LOSSES.write_text(losses_as_text(curves))


def _run(program: str, *arguments: object) -> None:
    command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    record()
