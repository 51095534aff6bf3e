"""Detection: the first rows decide, the store remembers, and a memory that is broken is ignored."""

import json
from pathlib import Path
from typing import Any

import pytest
from source_files import resolve

from prep.config import SourceConfig
from prep.conversations.formats import PLAIN_MESSAGES, Conversion
from prep.sources import detect_format
from prep.sources.detect_format import conversion_of
from shared.errors import DataError

ALPACA = {"instruction": "Add", "output": "5"}
PAIR = {"question": "2 + 3?", "answer": "5"}
COLUMNS = {"prompt": "question", "completion": "answer"}


def write(folder: Path, *rows: Any) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def detected(folder: Path, **keys: Any) -> Conversion:
    entry = SourceConfig(path="rows.jsonl", **keys)
    return conversion_of(resolve("rows.jsonl", folder), entry, folder)


def memories(folder: Path) -> list[Path]:
    return sorted(folder.glob("format-*.json"))


def test_a_stated_format_is_taken_without_reading_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, PAIR)
    monkeypatch.setattr(detect_format, "iter_chunks", lambda *_, **__: pytest.fail("rows are read"))
    columns = tuple(sorted(COLUMNS.items()))
    expected = Conversion("prompt_completion", columns, "group")
    keys = {"format": "prompt_completion", "columns": COLUMNS, "split_by": "group"}
    assert detected(tmp_path, **keys) == expected
    assert memories(tmp_path) == []


def test_what_was_detected_is_remembered_with_the_rows_and_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ALPACA)
    first = detected(tmp_path, split_by="group")
    assert first == Conversion("alpaca", (), "group")
    with monkeypatch.context() as patch:
        patch.setattr(detect_format, "iter_chunks", lambda *_, **__: pytest.fail("rows are read"))
        assert detected(tmp_path, split_by="group") == first
        assert detected(tmp_path) == Conversion("alpaca")
    write(tmp_path, PAIR)
    assert detected(tmp_path, columns=COLUMNS).format == "prompt_completion"
    assert len(memories(tmp_path)) == 2


def test_what_was_detected_for_other_columns_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path, PAIR)
    exchanged = {"prompt": "answer", "completion": "question"}
    for columns in (COLUMNS, exchanged, COLUMNS):
        assert dict(detected(tmp_path, columns=columns).columns) == columns


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "alpaca", "columns": 1}'])
def test_a_broken_memory_is_replaced(content: str, tmp_path: Path) -> None:
    write(tmp_path, ALPACA)
    expected = detected(tmp_path)
    (memory,) = memories(tmp_path)
    whole = memory.read_bytes()
    memory.write_text(content)
    assert detected(tmp_path) == expected
    assert memory.read_bytes() == whole


def test_rows_of_no_known_format_are_read_as_messages(tmp_path: Path) -> None:
    write(tmp_path, {"id": 1})
    assert detected(tmp_path) == PLAIN_MESSAGES
    write(tmp_path)
    assert detected(tmp_path, columns={"prompt": "question"}) == PLAIN_MESSAGES


def test_columns_that_fit_no_row_are_an_error_that_is_not_remembered(tmp_path: Path) -> None:
    write(tmp_path, PAIR)
    with pytest.raises(DataError, match="none of its first rows fits columns prompt = 'query'"):
        detected(tmp_path, columns={"prompt": "query"})
    assert memories(tmp_path) == []
