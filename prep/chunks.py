"""A chunk: some thousand consecutive rows of a source, as raw bytes that are cheap to send to a worker and parse there.

Its bounds depend on the content alone, so a chunk means the same rows in every build of the same source.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from prep.convert import PLAIN_MESSAGES, Conversion
from shared.errors import DataError

JSON_SPACE = b" \t\r"  # a line of only these is blank: no row
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_LONG_DIGITS = b"0" * 19  # from here an integer may not fit 64 bits, and orjson would make it a float


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    source: int
    """Index of the source in the mixture."""
    index: int
    """Of the chunk within the source."""
    first_row: int
    """Number of its first row: rows are counted from 0 over all files of a source, bad ones included."""
    num_rows: int
    file: str
    """For messages."""
    first_line: int | None
    """Number of its first line, counted from 1; None where rows are not lines."""
    kind: Literal["lines", "arrow"]
    payload: bytes
    """JSON lines, or an Arrow IPC stream."""
    conversion: Conversion = PLAIN_MESSAGES
    """What the rows of the source look like."""
    source_bytes_read: int = 0
    """How far into the files of the source this is: for people who wait. 0 where it is not known."""

    def where(self, row: int, line: int | None) -> str:
        """Return how messages name a row of this chunk."""
        return f"{self.file} (row {row})" if line is None else f"{self.file} line {line} (row {row})"


def parse_chunk(chunk: Chunk) -> Iterator[tuple[int, str, dict[str, Any] | DataError]]:
    """Yield (row number, where it is for messages, record) of every row; a malformed row yields its DataError."""
    return _parse_lines(chunk) if chunk.kind == "lines" else _parse_arrow(chunk)


def is_blank(line: bytes) -> bool:
    """Say whether a line, without its newline, holds no row."""
    return not line.strip(JSON_SPACE)


def _parse_lines(chunk: Chunk) -> Iterator[tuple[int, str, dict[str, Any] | DataError]]:
    row = chunk.first_row
    long_digits = _LONG_DIGITS in chunk.payload.translate(_DIGITS_TO_ZERO)
    for number, line in enumerate(chunk.payload.split(b"\n")):  # only \n: U+2028 and its like stay inside strings
        if is_blank(line):
            continue
        where = chunk.where(row, None if chunk.first_line is None else chunk.first_line + number)
        yield row, where, _parse_line(line, where, exact_integers=long_digits)
        row += 1


def _parse_line(line: bytes, where: str, *, exact_integers: bool) -> dict[str, Any] | DataError:
    try:
        record = orjson.loads(line)
        if exact_integers and re.search(rb"\d{19}", line):
            record = json.loads(line)
    except orjson.JSONDecodeError as exc:
        bad_utf8 = exc.msg.startswith("str is not valid UTF-8")
        what = "not valid UTF-8" if bad_utf8 else f"not valid JSON at character {exc.pos + 1}: {exc.msg}"
        return DataError(f"{where}: {what}; correct the row")
    if not isinstance(record, dict):
        return DataError(f"{where}: the row is of type {type(record).__name__}; expected an object with messages")
    return record


def _parse_arrow(chunk: Chunk) -> Iterator[tuple[int, str, dict[str, Any] | DataError]]:
    import pyarrow as pa

    with pa.ipc.open_stream(pa.py_buffer(chunk.payload)) as stream:
        table = stream.read_all()
    try:
        records: list[dict[str, Any] | None] = table.to_pylist()
    except UnicodeDecodeError:  # some string is not UTF-8: find out whose
        records = [None] * table.num_rows
    for offset, record in enumerate(records):
        row = chunk.first_row + offset
        where = chunk.where(row, None)
        yield row, where, _without_nulls(record if record is not None else _one_row(table, offset, where))


def _one_row(table: Any, offset: int, where: str) -> dict[str, Any] | DataError:
    try:
        (record,) = table.slice(offset, 1).to_pylist()
    except UnicodeDecodeError as exc:
        return DataError(f"{where}: a string is not valid UTF-8: {exc}; correct the row")
    return dict(record)


def _without_nulls(value: Any) -> Any:
    """Return `value` without null fields: Arrow gives every struct of a column the fields of all of them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
