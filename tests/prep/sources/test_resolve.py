"""Sources: the same rows from every format, identity by content, bad input named, chunks with
stable bounds."""

import gzip
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.config import SourceConfig
from prep.conversations.formats import PLAIN_MESSAGES, read_conversation
from prep.sources import lines as source_lines
from prep.sources.chunk import Chunk, parse_chunk
from prep.sources.lines import line_groups
from prep.sources.reader import iter_chunks
from prep.sources.resolve import ResolvedSource, remember, resolve_source
from shared.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"id": f"r{number}", "messages": [{"role": "user", "content": f"Hi \u2028 \x85 {number}"}]}
    for number in range(30)
]
LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)


def resolve(path: str, base: Path, **keys: Any) -> ResolvedSource:
    return resolve_source(SourceConfig(path=path, **keys), base, {})


def parsed(source: ResolvedSource) -> list[tuple[int, str, dict[str, Any] | DataError]]:
    return [row for chunk in iter_chunks(source, source_index=0) for row in parse_chunk(chunk)]


def records(path: str, base: Path) -> list[dict[str, Any] | DataError]:
    return [record for _, _, record in parsed(resolve(path, base))]


def write_hub_directory(root: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    (root / "data").mkdir(parents=True)
    half = len(rows) // 2
    pq.write_table(
        pa.Table.from_pylist(rows[:half]), root / "data" / "train-00000-of-00002.parquet"
    )
    pq.write_table(
        pa.Table.from_pylist(rows[half:]), root / "data" / "train-00001-of-00002.parquet"
    )
    pq.write_table(pa.Table.from_pylist(rows[:1]), root / "data" / "test-00000-of-00001.parquet")
    splits = "".join(
        f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "test")
    )
    (root / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n# Chats\n"
    )
    return root


def write_as(name: str, folder: Path) -> None:
    array = json.dumps(ROWS, indent=1).encode()
    path = folder / name
    if name == "hub":
        write_hub_directory(path)
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        content = array if ".json." in f"{name}." else LINES
        packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(content)
        path.write_bytes(packed)


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


@pytest.mark.parametrize(
    ("path", "files", "expected"),
    [
        ("chat.v2.jsonl.gz", ["chat.v2.jsonl.gz"], "chat.v2"),
        ("x/chat.parquet", ["x/chat.parquet"], "chat"),
        ("x/train-*.parquet", ["x/train-0.parquet"], "train"),
        ("mine/*.jsonl", ["mine/a.jsonl"], "mine"),
    ],
)
def test_a_source_is_named_after_its_stem(
    path: str, files: list[str], expected: str, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    assert resolve(path, tmp_path).name == expected
    assert resolve(path, tmp_path, name="own").name == "own"


def test_identity_is_content_not_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.jsonl").write_bytes(LINES)
    one, two = (resolve(f"{folder}/*.jsonl", tmp_path) for folder in ("one", "two"))
    assert one.identity() == two.identity()
    (tmp_path / "two" / "two.jsonl").write_bytes(LINES.replace(b"Hi", b"hi", 1))
    assert one.identity() != resolve("two/*.jsonl", tmp_path).identity()


def test_identity_tells_where_one_file_ends(tmp_path: Path) -> None:
    for folder, cut in (("one", 10), ("two", 11)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(LINES[:cut])
        (tmp_path / folder / "b.jsonl").write_bytes(LINES[cut:])
    assert resolve("one/*", tmp_path).identity() != resolve("two/*", tmp_path).identity()


def test_a_remembered_file_is_not_hashed_again_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    known = json.loads(json.dumps(remember([resolve("a.jsonl", tmp_path)])))
    known[str(path)][-1] = "remembered"
    config = SourceConfig(path="a.jsonl")
    assert resolve_source(config, tmp_path, known).files[0].sha256 == "remembered"
    assert resolve_source(config, tmp_path, {}).files[0].sha256 != "remembered"
    before = path.stat()
    path.write_bytes(LINES.replace(b"Hi", b"hi", 1))
    os.utime(
        path, ns=(before.st_atime_ns, before.st_mtime_ns)
    )  # same size, same inode, modification time set back
    assert resolve_source(config, tmp_path, known).files[0].sha256 != "remembered"


def test_a_hub_directory_is_identified_by_its_split_and_readme(tmp_path: Path) -> None:
    write_hub_directory(tmp_path / "one")
    write_hub_directory(tmp_path / "two")
    one = resolve("one", tmp_path)
    assert one.name == "one"
    assert one.identity() == resolve("two", tmp_path).identity()
    assert one.identity() != resolve("one", tmp_path, split="test").identity()
    assert [file.name for file in one.files] == [
        "README.md",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]


def test_a_hub_directory_gives_its_present_rows_not_cached_ones(tmp_path: Path) -> None:
    write_hub_directory(tmp_path / "hub")
    assert records("hub", tmp_path)[0] == ROWS[0]
    data = tmp_path / "hub" / "data" / "train-00000-of-00002.parquet"
    before = data.stat()
    pq.write_table(pa.Table.from_pylist([{**row, "id": "new"} for row in ROWS[:15]]), data)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    record = records("hub", tmp_path)[0]
    assert isinstance(record, dict)
    assert record["id"] == "new"


def test_a_missing_split_is_named_with_those_that_exist(tmp_path: Path) -> None:
    write_hub_directory(tmp_path / "hub")
    with pytest.raises(DataError, match="no split 'validation'; it has train, test"):
        resolve("hub", tmp_path, split="validation")


def test_a_pinned_hub_commit_needs_no_network_and_a_moving_one_is_remembered(
    tmp_path: Path,
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    pinned = resolve("org/chats", tmp_path, revision=commit)
    assert (pinned.name, pinned.hub_id, pinned.revision, pinned.files) == (
        "org/chats",
        "org/chats",
        commit,
        (),
    )
    assert pinned.identity() == {"hub_id": "org/chats", "revision": commit, "split": "train"}
    config = SourceConfig(path="org/chats", revision="main")
    moving = resolve_source(config, tmp_path, {"hub:org/chats@main": commit})
    assert moving.revision == commit
    assert remember([moving]) == {"hub:org/chats@main": commit}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing.jsonl", "no file 'missing.jsonl'"),
        ("./org/chats", "no file './org/chats'"),
        ("a/b/c", "no file 'a/b/c'"),
        ("*.jsonl", "no file matches '*.jsonl'"),
        ("notes.txt", "unknown format; expected .jsonl"),
        ("rows.parquet.gz", "unknown format; expected .jsonl"),
        ("empty_directory", "cannot be read as a data set"),
    ],
)
def test_a_source_that_is_not_there_is_named(path: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"x")
    (tmp_path / "rows.parquet.gz").write_bytes(b"x")
    (tmp_path / "empty_directory").mkdir()
    with pytest.raises(DataError) as caught:
        resolve(path, tmp_path)
    assert expected in str(caught.value)


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
def test_a_malformed_line_is_an_error_in_its_place_and_the_others_are_read(
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


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("final", [b"", b"\n", b"\r\n\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_line_endings_and_a_byte_order_mark_change_nothing(
    ending: bytes, final: bytes, start: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(start + LINES.rstrip(b"\n").replace(b"\n", ending) + final)
    assert records("a.jsonl", tmp_path) == ROWS


@pytest.mark.parametrize("content", [b"", b"\n", b" \t\r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_an_empty_file_has_no_rows(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl").write_bytes(b'{"n": 0}\n')
    assert parsed(resolve("*.jsonl", tmp_path)) == [(0, "b.jsonl line 1 (row 0)", {"n": 0})]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz"])
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.99])
def test_a_truncated_compressed_file_is_an_error_that_names_it(
    name: str, kept: float, tmp_path: Path
) -> None:
    write_as(name, tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DataError, match=f"{name} ends in the middle of its compressed data"):
        parsed(resolve(name, tmp_path))


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


def test_several_compressed_frames_are_one_file(tmp_path: Path) -> None:
    half = LINES.index(b"\n", 500) + 1
    for name, compress in (("a.jsonl.gz", gzip.compress), ("b.jsonl.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(compress(LINES[:half]) + compress(LINES[half:]))
        assert records(name, tmp_path) == ROWS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty; expected a JSON array"),
        ('{"data": []}', "begins with '{'; expected a JSON array"),
        ('[{"a": 1}', "the end of the file; expected ',' or ']'"),
        ('[{"a": 1},]', "is not valid JSON"),
        ('[{"a": 1} {"a": 2}]', "has '{' at character 11"),
        ('[{"a": 1}] []', "goes on after its array"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_broken_json_array_is_an_error_that_names_the_file(
    text: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError) as caught:
        parsed(resolve("a.json", tmp_path))
    assert str(caught.value).startswith("a.json ")
    assert expected in str(caught.value)


@pytest.mark.parametrize("text", ["[]", " [ ] \n", '\ufeff[\n {"a":\n 1}\r\n]\n'])
def test_a_json_array_may_be_spaced_in_any_way(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, newline="")
    assert records("a.json", tmp_path) == json.loads(text.lstrip("\ufeff"))


def test_a_bad_row_of_a_json_array_is_an_error_in_its_place(tmp_path: Path) -> None:
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


def test_a_string_that_is_not_utf8_in_parquet_spoils_its_row_only(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    pq.write_table(pa.table({"n": column}), tmp_path / "a.parquet")
    rows = parsed(resolve("a.parquet", tmp_path))
    assert [rows[0][2], rows[2][2]] == [{"n": "a"}, {"n": "c"}]
    assert str(rows[1][2]).startswith("a.parquet (row 1): a string is not valid UTF-8")


def test_a_file_that_changes_between_hashing_and_reading_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    source = resolve("a.jsonl", tmp_path)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"n": 1}\n')
    with pytest.raises(DataError, match="changed while it was being read"):
        parsed(source)


def test_no_chunk_is_handed_out_after_its_file_changed(
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


def blocks_of(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@given(
    st.binary(max_size=400).map(lambda data: data.translate(bytes([10, 32, 97, 13] * 64))),
    st.integers(1, 50),
)
@settings(deadline=None, max_examples=300)
def test_line_groups_depend_on_content_alone_and_lose_nothing(
    data: bytes, block_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_lines, "MAX_BYTES", 20)
        patch.setattr(source_lines, "MAX_LINES", 4)
        groups = list(line_groups(blocks_of(data, block_bytes)))
        assert groups == list(line_groups(blocks_of(data, 1000)))
    assert b"".join(group.payload for group in groups) == data
    for group in groups:
        lines = group.payload.removesuffix(b"\n").split(b"\n")
        assert group.num_lines == len(lines) <= 4
        assert group.num_rows == sum(bool(line.strip()) for line in lines)
        assert len(group.payload) <= 20 or len(lines) == 1
    assert all(group.payload.endswith(b"\n") for group in groups[:-1])


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


def test_a_line_longer_than_a_chunk_is_a_chunk_of_its_own(tmp_path: Path) -> None:
    long = json.dumps({"n": 1, "text": "x" * (9 << 20)}).encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 0}\n' + long + b'\n{"n": 2}\n')
    chunks = list(iter_chunks(resolve("a.jsonl", tmp_path), source_index=0))
    assert [chunk.num_rows for chunk in chunks] == [1, 1, 1]
    assert [chunk.first_line for chunk in chunks] == [1, 2, 3]


def test_nulls_are_absent_whether_the_rows_are_json_or_parquet(tmp_path: Path) -> None:
    call = {
        "id": "c",
        "function": {"name": "f", "arguments": {"a": None, "b": 1, "c": {"d": None}, "e": [1, 2]}},
    }
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "tool_calls": [call]}],
         "tools": None},
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c", "tool_calls": None}],
         "tools": [{"name": "f", "parameters": {"default": None, "x": [{"y": None, "z": "null"}]}}]},
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": None}]},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    found = []
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
        found.append(conversations)
    assert found[0] == found[1]
    assert found[0][0].messages[1]["tool_calls"][0]["function"]["arguments"] == {
        "b": 1,
        "c": {},
        "e": [1, 2],
    }
    assert "has no content" in found[0][2]


def test_a_huge_row_of_a_table_is_in_a_chunk_without_others(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(100)]
    rows[41]["messages"][0]["content"] = "x" * (5 << 20)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    chunks = list(iter_chunks(resolve("rows.parquet", tmp_path), source_index=0))
    assert [record for chunk in chunks for _, _, record in parse_chunk(chunk)] == rows
    assert [chunk.num_rows for chunk in chunks if len(chunk.payload) > 5 << 20] == [1]


def test_a_column_or_a_field_that_stands_twice_in_a_table_is_an_error_of_its_rows(
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
            source=0, index=0, first_row=0, num_rows=1, file=name, first_line=None, kind="arrow", payload=payload
        )  # fmt: skip
        ((row, where, record),) = parse_chunk(chunk)
        assert (row, where) == (0, f"{name} (row 0)")
        assert isinstance(record, DataError)


def test_a_number_that_cannot_be_read_is_the_error_of_its_row_in_an_array_too(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.json").write_text(f'[{{"a": {"9" * 5000}}}, {{"a": 1}}]')
    first, second = records("rows.json", tmp_path)
    assert "number is infinity" in str(first)
    assert second == {"a": 1}
