"""The loss of a source is that of its tokens alone, for any split of the steps."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_sets import random_packs, write_shard_set
from train_runs import RECIPE, VOCAB, records, train_apart, train_here
from transformers import AutoModelForCausalLM

NAMES = ("algebra", "chat", "code")
NO_DROPOUT = ("--set", "model.config.attention_dropout=0.0")
KEYS = [f"train_loss/{name}" for name in NAMES]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Packs that mix two sources; the third has no row."""
    folder = tmp_path_factory.mktemp("sources")
    packs = random_packs(num_packs=9, max_seq_len=32, vocab_size=VOCAB)
    origins = [
        [((number + index) % 2, 100 * number + index, 0) for index in range(len(pack))]
        for number, pack in enumerate(packs)
    ]
    shards = write_shard_set(
        folder / "set", packs, max_seq_len=32, vocab_size=VOCAB, origins=origins, source_names=NAMES
    )
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    return shards, recipe


def run_of(inputs: tuple[Path, Path], out: Path, *more: object) -> list[dict[str, Any]]:
    done = train_here(
        "--shards", inputs[0], "--recipe", inputs[1], "--output", out, *NO_DROPOUT, *more
    )
    assert done.exit_code == 0, done.output
    return records(out)


def test_the_loss_of_a_source_is_that_of_its_sequences_alone(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """One step over all packs with a learning rate of 0, so the exported model has the logged
    losses."""
    whole = (
        "--set",
        "batch.packs_per_step=9",
        "--max-steps",
        1,
        "--set",
        "schedule.warmup_ratio=1.0",
    )
    (record,) = run_of(inputs, tmp_path / "run", *whole)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    packs = random_packs(num_packs=9, max_seq_len=32, vocab_size=VOCAB)
    sums, counts = [0.0, 0.0], [0, 0]
    for number, pack in enumerate(packs):
        for index, (tokens, mask) in enumerate(pack):
            if sum(mask):
                labels = torch.tensor(
                    [[token if bit else -100 for token, bit in zip(tokens, mask, strict=True)]]
                )
                loss = model(input_ids=torch.tensor([tokens]), labels=labels).loss.item()
                sums[(number + index) % 2] += loss * sum(mask)
                counts[(number + index) % 2] += sum(mask)
    for name, total, count in zip(NAMES, sums, counts, strict=False):
        assert record[f"train_loss/{name}"] == pytest.approx(total / count, rel=1e-5)
    assert record["train_loss/code"] is None
    assert record["train_loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


@pytest.mark.parametrize("norm", ["token", "sample", "sum"])
def test_sources_add_up_to_the_loss_whatever_the_norm(
    norm: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    (record, *_) = run_of(inputs, tmp_path / "run", "--set", f"loss.norm={norm}", "--max-steps", 2)
    assert record["train_loss/code"] is None
    assert all(1 < record[key] < 2 * math.log(VOCAB) for key in KEYS[:2])


def test_a_resumed_window_logs_the_losses_of_an_uninterrupted_one(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    windows = ("--set", "log.every_steps=3")
    whole = run_of(inputs, tmp_path / "whole", *windows)
    call = (
        "--shards",
        inputs[0],
        "--recipe",
        inputs[1],
        "--output",
        tmp_path / "cut",
        *NO_DROPOUT,
        *windows,
    )
    assert train_here(*call, "--stop-after", 4).exit_code == 75
    assert train_here(*call).exit_code == 0
    for record, expected in zip(records(tmp_path / "cut"), whole, strict=True):
        for key in ("step", "train_loss", "loss_tokens", *KEYS):
            assert record[key] == expected[key]


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [1, 2])
def test_two_ranks_log_the_same_losses_of_sources(
    sharing: int, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    alone = run_of(inputs, tmp_path / "one", "--max-steps", 3)
    shared = (
        "--set",
        f"engine.sequence_parallel={sharing}",
        "--nproc-per-node",
        2,
        "--max-steps",
        3,
    )
    call = (
        "--shards",
        inputs[0],
        "--recipe",
        inputs[1],
        "--output",
        tmp_path / "two",
        *NO_DROPOUT,
        *shared,
    )
    done = train_apart(*call)
    assert done.returncode == 0, done.stderr
    for record, expected in zip(records(tmp_path / "two"), alone, strict=True):
        assert record["loss_tokens"] == expected["loss_tokens"]
        for key in KEYS[:2]:
            assert record[key] == pytest.approx(expected[key], rel=1e-5)
