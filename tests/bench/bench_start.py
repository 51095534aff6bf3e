"""The time of sft-train from its command to its first step, and its memory, by the size of the set.

Two made-up sets with packs of 2,048 tokens are trained on for a few steps: a small one, and one of
10 GB whose shards are the same files under many names, so that it needs little disk. Imports and
the building of the model do not depend on the set and are left out. `data wait` is the share of a
step in which the model waits for its batch. Private memory is that of the process at the end; pages
of the shards that it has read belong to the system, which shares and drops them.

    python tests/bench/bench_start.py [--gigabytes 10] [--steps 6]
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.shard_format import fingerprint_of, sealed
from shared.shard_reader import read_manifest

TESTS = Path(__file__).resolve().parents[1]
PACK, SEQUENCE, VOCAB = 2048, 512, 1024
# 512 MiB of tokens.
PACKS_PER_SHARD = 1 << 16
RECIPE = """
name = "start"
[model.config]
model_type = "llama"
hidden_size = 128
intermediate_size = 256
num_hidden_layers = 2
num_attention_heads = 4
[optim]
learning_rate = 1e-4
[batch]
packs_per_step = 4
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--measure", nargs=2, metavar=("SET", "RECIPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*map(Path, options.measure), steps=options.steps)
        return
    print(
        "| set | command to first step, s | open and plan | engine | private MiB | pages of files,"
        " MiB | data wait |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.toml").write_text(RECIPE)
        for title, num_shards, packs in (("small", 1, 64), ("large", 0, PACKS_PER_SHARD)):
            shard_bytes = packs * (PACK * 6 + PACK // SEQUENCE * 32 + 12)
            count = num_shards or round(options.gigabytes * 1e9 / shard_bytes)
            path = write_set(folder / title, num_shards=count, packs=packs)
            command = [sys.executable, __file__, "--steps", str(options.steps), "--measure", path]
            done = subprocess.run(
                [*map(str, command), folder / "recipe.toml"], capture_output=True, text=True
            )
            if done.returncode != 0:
                sys.exit(done.stderr[-3000:])
            result = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {count * shard_bytes / 1e9:,.3f} GB | {result['start']:.2f} |"
                f" {result['prepare']:.2f} | {result['engine']:.2f} |"
                f" {result['private_mib']:,.0f} | {result['file_mib']:,.0f} |"
                f" {result['data_wait']:.2%} |",
                flush=True,
            )


def write_set(path: Path, *, num_shards: int, packs: int) -> Path:
    """Write a set whose shards are one shard under many names; return `path`."""
    sys.path.insert(0, str(TESTS / "builders"))
    write_shard_set = importlib.import_module("shard_sets").write_shard_set
    write_shard_set(
        path, [[([1] * SEQUENCE, [0, *[1] * (SEQUENCE - 1)])]], max_seq_len=PACK, vocab_size=VOCAB
    )
    manifest = read_manifest(path)
    write_columns(path / "shards" / "00000", sequences=packs * (PACK // SEQUENCE), packs=packs)
    first = replace(
        manifest.shards[0],
        packs=packs,
        sequences=packs * PACK // SEQUENCE,
        tokens=packs * PACK,
        loss_tokens=packs * (PACK - PACK // SEQUENCE),
        files={
            file: replace(facts, bytes=(path / "shards" / "00000" / file).stat().st_size)
            for file, facts in manifest.shards[0].files.items()
        },
    )
    shards = tuple(replace(first, path=f"shards/{number:05d}") for number in range(num_shards))
    for shard in shards[1:]:
        (path / shard.path).mkdir()
        for file in first.files:
            os.link(path / first.path / file, path / shard.path / file)
    whole = replace(
        manifest,
        shards=shards,
        max_token_id=VOCAB - 1,
        totals=replace(
            manifest.totals,
            packs=first.packs * num_shards,
            sequences=first.sequences * num_shards,
            tokens=first.tokens * num_shards,
            loss_tokens=first.loss_tokens * num_shards,
            density=1.0,
        ),
        fingerprint=fingerprint_of(
            max_seq_len=PACK,
            tokenizer_files=manifest.tokenizer.files,
            template_sha256=manifest.chat_template.sha256,
            source_names=[source.name for source in manifest.sources],
            shards=shards,
        ),
    )
    (path / "manifest.json").write_text(json.dumps(sealed(whole)))
    return path


def write_columns(folder: Path, *, sequences: int, packs: int) -> None:
    tokens = packs * PACK
    mask = np.ones(tokens, "|u1")
    mask[::SEQUENCE] = 0
    origin = np.zeros((sequences, 3), "<i8")
    origin[:, 1] = np.arange(sequences)
    columns: dict[str, Any] = {
        "tokens": (np.arange(tokens, dtype="<i8") * 7 % VOCAB).astype("<i4"),
        "loss_mask": mask,
        "kind": mask,
        "seq_offsets": np.arange(0, tokens + 1, SEQUENCE, dtype="<i8"),
        "pack_offsets": np.arange(0, sequences + 1, PACK // SEQUENCE, dtype="<i8"),
        "pack_loss_tokens": np.full(packs, PACK - PACK // SEQUENCE, "<i4"),
        "seq_origin": origin,
    }
    for name, column in columns.items():
        (folder / f"{name}.npy").unlink()
        np.save(folder / f"{name}.npy", column)


def measure(shards: Path, recipe: Path, *, steps: int) -> None:
    """Import everything, then train as the command does and time the parts; in a new process."""
    for name in (
        "deepspeed",
        "transformers.models.llama.modeling_llama",
        "liger_kernel",
        "train.loop.rank",
    ):
        importlib.import_module(name)
    from train.loop import loop, rank, start
    from train.run.prepare import TrainRequest, check_ranks, prepare

    seconds: dict[str, float] = {}
    first_step: list[float] = []

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds[name] = time.perf_counter() - began

        return call

    accumulate = loop.accumulate

    def noting_the_first(*arguments: Any) -> Any:
        first_step.append(time.perf_counter())
        return accumulate(*arguments)

    vars(start)["build_model"] = timed("model", start.build_model)
    vars(start)["start_engine"] = timed("engine", start.start_engine)
    vars(loop)["accumulate"] = noting_the_first
    vars(rank)["_export"] = lambda *_: None
    began = time.perf_counter()
    prepared = prepare(
        TrainRequest(
            shards=shards,
            recipe=str(recipe),
            output=shards.with_name(f"run-{shards.name}"),
            max_steps=steps,
        )
    )
    check_ranks(prepared, 1)
    seconds["prepare"] = time.perf_counter() - began
    rank.run_rank(prepared)
    lines = prepared.run.metrics.read_text().splitlines()
    records = [json.loads(line) for line in lines][1:]
    waited, all_of_it = (
        sum(record[key] for record in records) for key in ("data_seconds", "step_seconds")
    )
    result = {
        "start": first_step[0] - began - seconds["model"],
        "prepare": seconds["prepare"],
        "engine": seconds["engine"],
        "private_mib": memory_mib("RssAnon"),
        "file_mib": memory_mib("RssFile"),
        "data_wait": waited / all_of_it,
    }
    print(json.dumps(result))


def memory_mib(kind: str) -> float:
    """Return the resident memory of this process: private (RssAnon) or of files (RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


if __name__ == "__main__":
    main()
