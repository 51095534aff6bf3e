"""metrics.jsonl holds exactly what the docstring of train/loop/metrics.py lists; Weights & Biases
shows the same."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from shard_sets import random_packs, write_shard_set
from train_runs import RECIPE, VOCAB, records, train_here
from wandb_records import histories

from train.loop import metrics
from train.loop.metrics import console_line

NAMES = ("algebra", "chat")
STEPS = 4

INTEGERS = {"step", "skipped_steps", "loss_tokens", "total_tokens", "eval_tokens"}
INTEGERS |= {"total_tokens_including_padding"}
MAY_BE_NULL = {"train_loss", "train_loss/SOURCE", "grad_norm", "load_balancing_loss", "mfu"}
MAY_BE_NULL |= {"eval_loss/SOURCE"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two sources that is evaluated, stopped after two steps and resumed, with an offline
    W&B log."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("records")
    for name, seed in (("set", 1), ("set/eval", 2)):
        packs = random_packs(num_packs=10, max_seq_len=32, vocab_size=VOCAB, seed=seed)
        origins = [[(row % 2, row, 0) for row in range(len(pack))] for pack in packs]
        write_shard_set(
            folder / name,
            packs,
            max_seq_len=32,
            vocab_size=VOCAB,
            origins=origins,
            source_names=NAMES,
        )
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    call = ["--shards", folder / "set", "--recipe", recipe, "--output", folder / "run"]
    call += ["--max-steps", STEPS, "--set", "log.wandb=offline"]
    assert train_here(*call, "--stop-after", 2).exit_code == 75
    assert train_here(*call).exit_code == 0
    return folder / "run"


def documented() -> tuple[set[str], set[str], set[str]]:
    """Return the keys of the docstring: of training records, of evaluation records, those with
    null."""
    tables: list[set[str]] = [set(), set()]
    nullable: set[str] = set()
    keys: list[str] = []
    for line in (metrics.__doc__ or "").splitlines():
        if line.startswith("An evaluation"):
            tables.reverse()
        if match := re.match(r"    ([a-z_]+(?:/SOURCE)?(?:, [a-z_]+)*)  +\S", line):
            keys = match[1].split(", ")
            tables[0].update(keys)
        if line.startswith("    ") and "null" in line:
            nullable.update(keys)
    return tables[1], tables[0], nullable


def key_of(name: str) -> str:
    base, separator, source = name.partition("/")
    assert source in ("", *NAMES)
    return f"{base}/SOURCE" if separator else base


def test_records_have_exactly_the_keys_of_the_docstring(run: Path) -> None:
    training, evaluation, _ = documented()
    run_records = records(run)
    assert [record["step"] for record in run_records if "train_loss" in record] == list(
        range(1, STEPS + 1)
    )
    assert any("eval_loss" in record for record in run_records)
    for record in run_records:
        assert {key_of(name) for name in record} == (
            evaluation if "eval_loss" in record else training
        )
        assert {name.partition("/")[2] for name in record} == {"", *NAMES}


def test_values_have_the_types_of_the_docstring(run: Path) -> None:
    assert documented()[2] == MAY_BE_NULL
    for record in records(run):
        for name, value in record.items():
            if value is None:
                assert key_of(name) in MAY_BE_NULL, name
            else:
                assert type(value) is (int if name in INTEGERS else float), (name, value)


def test_weights_and_biases_has_each_step_once_under_one_id_and_the_same_numbers(run: Path) -> None:
    (first, before), (second, after) = histories(run / "wandb")
    assert first == second == json.loads((run / "config.json").read_text())["wandb_id"]
    assert [[row["_step"] for row in rows if "train_loss" in row] for rows in (before, after)] == [
        [1, 2],
        [3, 4],
    ]
    expected: dict[int, dict[str, Any]] = {}
    # An evaluation belongs to the row of its step.
    for record in records(run):
        shown = {name: value for name, value in record.items() if value is not None}
        expected.setdefault(record["step"], {}).update(shown)
    merged: dict[int, dict[str, Any]] = {}
    # A stop may come before the evaluation of its step: the resumed run adds that to the row.
    for row in before + after:
        values = {name: value for name, value in row.items() if not name.startswith("_")}
        row_so_far = merged.setdefault(row["_step"], {})
        assert row_so_far.keys() & values.keys() <= {"step", "epoch"}
        row_so_far.update(values)
    assert merged == expected


def test_the_console_line_shows_a_dash_for_a_loss_that_there_is_not() -> None:
    speed = {"per_device_tps": 1234.5, "step_seconds": 0.5, "mfu": None}
    record = {"step": 3, "train_loss": None, "learning_rate": 1e-5, "grad_norm": 0.0, **speed}
    expected = "step 3/9  loss -  lr 1.00e-05  grad 0  1,234 tok/s/device  0.50 s/step"
    assert console_line(record, 9) == expected
    assert console_line({**record, "train_loss": 2.0, "mfu": 0.375}, 9).endswith("mfu 37.5%")
