"""The reader: the same rows from every format, in small chunks, and none from a changed file."""

import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import LINES, ROWS, parsed, records, resolve, write_as, write_hub_directory

from prep.sources import lines as source_lines
from prep.sources.chunk import parse_chunk
from prep.sources.reader import iter_chunks
from shared.errors import DataError


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.ndjson",
        "a.jsonl.gz",
        "a.jsonl.zst",
        "a.json",
        "a.json.gz",
        "a.json.zst",
        "a.parquet",
        "hub",
    ],
)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    write_as(name, tmp_path)
    rows = parsed(resolve(name, tmp_path))
    assert [record for _, _, record in rows] == ROWS
    assert [number for number, _, _ in rows] == list(range(len(ROWS)))


def test_rows_are_located_by_file_line_and_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n  \t\r\n{"a": 2}\n')
    (tmp_path / "b.jsonl").write_bytes(b"\n" + b'{"a": 3}')
    assert [row[:2] for row in parsed(resolve("*.jsonl", tmp_path))] == [
        (0, "a.jsonl line 1 (row 0)"),
        (1, "a.jsonl line 4 (row 1)"),
        (2, "b.jsonl line 2 (row 2)"),
    ]
    (tmp_path / "a.json").write_text('[{"a": 1}]')
    assert parsed(resolve("a.json", tmp_path))[0][1] == "a.json (row 0)"


def test_a_glob_is_one_source_in_bytewise_order(tmp_path: Path) -> None:
    for name in ("b", "a", "B", "a-1", "é"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"file": name}))
    assert records("*.jsonl", tmp_path) == [{"file": name} for name in ("B", "a-1", "a", "b", "é")]


def test_a_hub_directory_gives_the_rows_of_its_files_and_none_of_a_cache(tmp_path: Path) -> None:
    write_hub_directory(tmp_path / "hub")
    assert records("hub", tmp_path)[0] == ROWS[0]
    data = tmp_path / "hub" / "data" / "train-00000-of-00002.parquet"
    before = data.stat()
    pq.write_table(pa.Table.from_pylist([{**row, "id": "new"} for row in ROWS[:15]]), data)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    record = records("hub", tmp_path)[0]
    assert isinstance(record, dict)
    assert record["id"] == "new"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "hub"])
def test_damaged_bytes_are_an_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    write_as(name, tmp_path)
    path = (
        tmp_path / name / "data" / "train-00000-of-00002.parquet"
        if name == "hub"
        else tmp_path / name
    )
    path.write_bytes(b"damaged " * 20)
    with pytest.raises(DataError, match=name):
        parsed(resolve(name, tmp_path))


def test_a_file_that_changes_between_hashing_and_reading_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    source = resolve("a.jsonl", tmp_path)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"n": 1}\n')
    with pytest.raises(DataError, match="changed while it was being read"):
        parsed(source)


def test_no_chunk_comes_out_after_its_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_lines, "MAX_BYTES", 200)
    monkeypatch.setattr(source_lines, "_BLOCK_BYTES", 200)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    chunks = iter_chunks(resolve("a.jsonl", tmp_path), source_index=0)
    next(chunks)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(DataError, match="changed while it was being read"):
        next(chunks)


def test_chunks_are_small_numbered_and_picklable(tmp_path: Path) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(row * 3000)
    (tmp_path / "b.jsonl").write_bytes(b"{}\n" * 5000)
    chunks = list(iter_chunks(resolve("*.jsonl", tmp_path), source_index=3))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert {chunk.source for chunk in chunks} == {3}
    assert sum(chunk.num_rows for chunk in chunks) == 8000
    assert [chunk.first_row for chunk in chunks][1:] == [
        chunk.first_row + chunk.num_rows for chunk in chunks
    ][:-1]
    assert max(len(chunk.payload) for chunk in chunks) <= 4 << 20
    assert max(chunk.num_rows for chunk in chunks) <= 4096
    assert pickle.loads(pickle.dumps(chunks[0])) == chunks[0]


def test_arrow_chunks_are_small_and_lose_no_row(tmp_path: Path) -> None:
    table = pa.table({"n": list(range(10_000)), "text": ["x" * 900] * 10_000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3000)
    chunks = list(iter_chunks(resolve("a.parquet", tmp_path), source_index=0))
    assert len(chunks) > 2
    assert max(len(chunk.payload) for chunk in chunks) < 5 << 20
    rows = [row for chunk in chunks for row in parse_chunk(chunk)]
    assert [number for number, _, _ in rows] == list(range(10_000))
    assert [record["n"] for _, _, record in rows if isinstance(record, dict)] == list(range(10_000))


def test_a_line_longer_than_a_chunk_is_alone_in_its_chunk(tmp_path: Path) -> None:
    long = json.dumps({"n": 1, "text": "x" * (9 << 20)}).encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 0}\n' + long + b'\n{"n": 2}\n')
    chunks = list(iter_chunks(resolve("a.jsonl", tmp_path), source_index=0))
    assert [chunk.num_rows for chunk in chunks] == [1, 1, 1]
    assert [chunk.first_line for chunk in chunks] == [1, 2, 3]


def test_a_huge_row_of_a_table_is_alone_in_its_chunk(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(100)]
    rows[41]["messages"][0]["content"] = "x" * (5 << 20)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    chunks = list(iter_chunks(resolve("rows.parquet", tmp_path), source_index=0))
    assert [record for chunk in chunks for _, _, record in parse_chunk(chunk)] == rows
    assert [chunk.num_rows for chunk in chunks if len(chunk.payload) > 5 << 20] == [1]
