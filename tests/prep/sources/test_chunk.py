"""Chunks: each row becomes a record or its own error, whatever the rows around it are."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import parsed, records, resolve

from prep.config import SourceConfig
from prep.conversations.formats import PLAIN_MESSAGES, read_conversation
from prep.sources.chunk import Chunk, parse_chunk
from prep.sources.reader import iter_chunks
from prep.sources.resolve import resolve_source
from shared.errors import DataError


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": 1', "not valid JSON at character 8"),
        (b'{"a": NaN}', "not valid JSON at character 7"),
        (b'{"a": "\\ud800"}', "not valid JSON at character 8: no low surrogate"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON at character 1: UTF-8 byte order mark"),
        (b'["a"]', "the row is of type list; expected an object"),
        (b"[" * 5000, "nested more than 64 levels deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number is infinity when parsed as double"),
    ],
)
def test_a_malformed_line_is_the_error_of_its_row_and_the_others_are_read(
    line: bytes, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 0}\n' + line + b'\n{"n": 2}\n')
    rows = parsed(resolve("a.jsonl", tmp_path))
    assert [number for number, _, _ in rows] == [0, 1, 2]
    assert rows[0][2] == {"n": 0}
    assert rows[2][2] == {"n": 2}
    error = rows[1][2]
    assert isinstance(error, DataError)
    assert str(error).startswith("a.jsonl line 2 (row 1): ")
    assert expected in str(error)


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1, 10**30, 1234567890123456789])
def test_integers_of_any_size_stay_exact(number: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"n": {number}, "f": 1.5}}\n')
    assert records("a.jsonl", tmp_path) == [{"n": number, "f": 1.5}]


def test_a_bad_row_of_a_json_array_is_the_error_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"n": 0}, {"a": "\\ud800"}, 3, {"n": 3}]')
    rows = records("a.json", tmp_path)
    assert [isinstance(row, DataError) for row in rows] == [False, True, True, False]


def test_null_fields_of_arrow_structs_are_absent(tmp_path: Path) -> None:
    ragged = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "tool", "content": "x", "name": "f"},
            ]
        }
    ]
    rows = [{"extra": [None, 1], "messages": []}, *ragged]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert records("a.parquet", tmp_path) == rows


def test_a_string_in_parquet_that_is_not_utf8_is_the_error_of_its_row(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    pq.write_table(pa.table({"n": column}), tmp_path / "a.parquet")
    rows = parsed(resolve("a.parquet", tmp_path))
    assert [rows[0][2], rows[2][2]] == [{"n": "a"}, {"n": "c"}]
    assert str(rows[1][2]).startswith("a.parquet (row 1): a string is not valid UTF-8")


def test_nulls_are_absent_whether_the_rows_are_json_or_parquet(tmp_path: Path) -> None:
    call = {
        "id": "c",
        "function": {"name": "f", "arguments": {"a": None, "b": 1, "c": {"d": None}, "e": [1, 2]}},
    }
    question = {"role": "user", "content": "b"}
    named = {"role": "user", "content": "a", "name": None}
    answer = {"role": "assistant", "content": "c", "tool_calls": None}
    tool = {"name": "f", "parameters": {"default": None, "x": [{"y": None, "z": "null"}]}}
    rows = [
        {"messages": [named, {"role": "assistant", "tool_calls": [call]}], "tools": None},
        {"messages": [question, answer], "tools": [tool]},
        {"messages": [question, {"role": "assistant", "content": None}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    results = []
    for name in ("a.jsonl", "b.parquet"):
        source = resolve_source(SourceConfig(path=name), tmp_path, {})
        conversations: list[Any] = []
        for chunk in iter_chunks(source, source_index=0):
            for _, _, record in parse_chunk(chunk):
                assert isinstance(record, dict)
                try:
                    conversations.append(read_conversation(record, PLAIN_MESSAGES, where="here"))
                except DataError as exc:
                    conversations.append(str(exc))
        results.append(conversations)
    assert results[0] == results[1]
    assert results[0][0].messages[1]["tool_calls"][0]["function"]["arguments"] == {
        "b": 1,
        "c": {},
        "e": [1, 2],
    }
    assert "has no content" in results[0][2]


def test_a_column_or_a_field_that_a_table_has_twice_is_the_error_of_its_rows(
    tmp_path: Path,
) -> None:
    struct = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["role", "role"])
    tables = {
        "column": pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["id", "id"]),
        "field": pa.Table.from_arrays([struct], names=["messages"]),
    }
    for name, table in tables.items():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        payload = sink.getvalue().to_pybytes()
        chunk = Chunk(
            source=0,
            index=0,
            first_row=0,
            num_rows=1,
            file=name,
            first_line=None,
            kind="arrow",
            payload=payload,
        )
        ((row, where, record),) = parse_chunk(chunk)
        assert (row, where) == (0, f"{name} (row 0)")
        assert isinstance(record, DataError)


def test_an_infinite_number_in_an_array_is_the_error_of_its_row(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.json").write_text(f'[{{"a": {"9" * 5000}}}, {{"a": 1}}]')
    first, second = records("rows.json", tmp_path)
    assert "number is infinity" in str(first)
    assert second == {"a": 1}
