"""Groups of lines: they depend on the content alone; a damaged file is named."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import LINES, ROWS, parsed, records, resolve, write_as

from prep.sources import lines as source_lines
from prep.sources.lines import array_groups, line_groups
from shared.errors import DataError


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
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_truncated_compressed_file_is_an_error_that_names_it(
    name: str, share: float, tmp_path: Path
) -> None:
    write_as(name, tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=f"{name} ends in the middle of its compressed data"):
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
        ('[{"a": 1}] []', "has more text after its array"),
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


A_VALUE = st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@given(elements=st.lists(A_VALUE, max_size=9), indent=st.none() | st.integers(0, 2))
@settings(deadline=None)
def test_the_elements_of_an_array_are_lines_in_groups_of_the_same_bounds(
    elements: list[object], indent: int | None
) -> None:
    text = json.dumps(elements, indent=indent, ensure_ascii=False).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_lines, "MAX_BYTES", 20)
        patch.setattr(source_lines, "MAX_LINES", 4)
        groups = list(array_groups(blocks_of(text, 7), name="a.json"))
    lines = [line for group in groups for line in group.payload.split(b"\n")]
    assert [json.loads(line) for line in lines] == elements
    for group in groups:
        assert group.num_rows == group.num_lines == group.payload.count(b"\n") + 1 <= 4
        assert len(group.payload) <= 20 or group.num_rows == 1
