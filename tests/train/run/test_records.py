"""Records are cut back to the checkpoint on resume; a line that a crash cut short is ignored."""

import json
from pathlib import Path
from typing import Any

import pytest

from train.run.records import keep_records, read_records

RECORDS: list[dict[str, Any]] = [
    {"step": 1, "train_loss": 2.5},
    {"step": 2, "train_loss": 1.25},
    {"step": 2, "eval_loss": 1.0},
    {"step": 3, "train_loss": None},
    {"step": 4, "train_loss": 0.5},
]
LINES = [json.dumps(record, sort_keys=True) + "\n" for record in RECORDS]


def steps(records: list[dict[str, Any]]) -> list[int]:
    return [record["step"] for record in records]


@pytest.mark.parametrize("size", range(0, len("".join(LINES)) + 1, 3))
def test_a_file_that_was_cut_anywhere_holds_the_records_of_its_whole_lines(
    size: int, tmp_path: Path
) -> None:
    text = "".join(LINES)[:size]
    path = tmp_path / "metrics.jsonl"
    path.write_text(text, encoding="utf-8")
    # A line that lacks only its end is whole.
    num_whole = sum(text.startswith("".join(LINES[: n + 1]).rstrip()) for n in range(len(LINES)))
    assert read_records(path) == RECORDS[:num_whole]
    keep_records(path, up_to_step=2)
    assert path.read_text() == "".join(line for line in LINES[: min(num_whole, 3)])


def test_later_records_go_away_and_nothing_else_lies_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(LINES) + '{"step": 5, "trai', encoding="utf-8")
    keep_records(path, up_to_step=3)
    assert steps(read_records(path)) == [1, 2, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_evaluation_that_the_checkpoint_does_not_hold_is_dropped(tmp_path: Path) -> None:
    """The resumed run evaluates the step again; earlier evaluations stay."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(LINES), encoding="utf-8")
    keep_records(path, up_to_step=4, is_evaluated=False)
    assert read_records(path) == RECORDS
    keep_records(path, up_to_step=2, is_evaluated=False)
    assert read_records(path) == RECORDS[:2]


def test_a_missing_file_stays_missing(tmp_path: Path) -> None:
    keep_records(tmp_path / "metrics.jsonl", up_to_step=0)
    assert not (tmp_path / "metrics.jsonl").exists()
