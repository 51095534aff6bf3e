"""A chunk: some thousand consecutive rows of a source, as raw bytes that are cheap to send to a
worker and parse there.

Its bounds depend on the content alone, so a chunk means the same rows in every build of the same
source.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from prep.conversations.formats import PLAIN_MESSAGES, Conversion
from prep.conversations.json_text import (
    check_depth,
    has_long_integers,
    most_keys,
    parse,
    without_nulls,
)
from shared.errors import DataError

JSON_SPACE = b" \t\r"  # a line of only these is blank: no row


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    source: int
    """Index of the source in the mixture."""
    index: int
    """Of the chunk within the source."""
    first_row: int
    """Number of its first row: rows are counted from 0 over all files of a source, bad ones
    included."""
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
    """How far into the files of the source this is: for people who wait. 0 where it is not
    known."""

    def where(self, row: int, line: int | None) -> str:
        """Return how messages name a row of this chunk."""
        return (
            f"{self.file} (row {row})" if line is None else f"{self.file} line {line} (row {row})"
        )


def parse_chunk(chunk: Chunk) -> Iterator[tuple[int, str, dict[str, Any] | DataError]]:
    """Yield (row number, where it is for messages, record) of every row; a malformed row yields its
    DataError."""
    return _parse_lines(chunk) if chunk.kind == "lines" else _parse_arrow(chunk)


def is_blank(line: bytes) -> bool:
    """Say whether a line, without its newline, holds no row."""
    return not line.strip(JSON_SPACE)


def _parse_lines(chunk: Chunk) -> Iterator[tuple[int, str, dict[str, Any] | DataError]]:
    row = chunk.first_row
    long_integers, nulls = has_long_integers(chunk.payload), b"null" in chunk.payload
    lines = chunk.payload.split(b"\n")  # only \n: U+2028 and its like stay inside strings
    bounds = np.cumsum([0, *(len(line) + 1 for line in lines)])
    for number, (line, keys) in enumerate(
        zip(lines, most_keys(chunk.payload, bounds), strict=True)
    ):
        if is_blank(line):
            continue
        where = chunk.where(row, None if chunk.first_line is None else chunk.first_line + number)
        record = _parse_line(line, where, keys, exact_integers=long_integers)
        yield row, where, without_nulls(record) if nulls and b"null" in line else record
        row += 1


def _parse_line(
    line: bytes, where: str, keys: int, *, exact_integers: bool
) -> dict[str, Any] | DataError:
    try:
        record = parse(line, where, most_keys=keys, exact_integers=exact_integers)
    except DataError as exc:
        return exc
    if not isinstance(record, dict):
        return DataError(
            f"{where}: the row is of type {type(record).__name__}; expected an object with messages"
        )
    return record


def _parse_arrow(chunk: Chunk) -> Iterator[tuple[int, str, dict[str, Any] | DataError]]:
    import pyarrow as pa

    with pa.ipc.open_stream(pa.py_buffer(chunk.payload)) as stream:
        table = stream.read_all()
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    try:
        records: list[dict[str, Any] | None] = table.to_pylist()
    except (
        ValueError,
        RecursionError,
        OverflowError,
    ):  # some value is nothing that Python has: find out whose
        records = [None] * table.num_rows
    for offset, record in enumerate(records):
        row = chunk.first_row + offset
        where = chunk.where(row, None)
        if twice:
            yield (
                row,
                where,
                DataError(f"{where}: there are two columns {twice[0]!r}; keep one of them"),
            )
        else:
            yield (
                row,
                where,
                _arrow_record(table, offset, where) if record is None else _checked(record, where),
            )


def _arrow_record(table: Any, offset: int, where: str) -> dict[str, Any] | DataError:
    try:
        (record,) = table.slice(offset, 1).to_pylist()
    except UnicodeDecodeError as exc:
        return DataError(f"{where}: a string is not valid UTF-8: {exc}; correct the row")
    except (ValueError, RecursionError, OverflowError) as exc:
        return DataError(f"{where}: a value cannot be read: {exc}; correct the row")
    return _checked(record, where)


def _checked(record: dict[str, Any], where: str) -> dict[str, Any] | DataError:
    try:
        check_depth(record, where)
    except DataError as exc:
        return exc
    return dict(without_nulls(record))
