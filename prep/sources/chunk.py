"""A chunk: a few thousand consecutive rows of a source as raw bytes, which a worker parses.

Bytes are cheap to send to another process. The bounds of a chunk depend on the content alone, so a
chunk holds the same rows in every build of the same source.
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

# a line of only these is blank: no row
JSON_SPACE = b" \t\r"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    source: int
    """Index of the source in the mixture."""
    index: int
    """Index of the chunk in the source."""
    first_row: int
    """Rows are counted from 0 over all files of a source, bad ones included."""
    num_rows: int
    file: str
    """Name of the file, for messages."""
    first_line: int | None
    """Lines are counted from 1; None if rows are not lines."""
    kind: Literal["lines", "arrow"]
    payload: bytes
    """JSON lines, or an Arrow IPC stream."""
    conversion: Conversion = PLAIN_MESSAGES
    """The format of the rows."""
    source_bytes_read: int = 0
    """How far the files of the source are read, for the progress display; 0 if unknown."""

    def where(self, row: int, line: int | None) -> str:
        """Return how messages name a row of this chunk."""
        return (
            f"{self.file} (row {row})" if line is None else f"{self.file} line {line} (row {row})"
        )


def parse_chunk(chunk: Chunk) -> Iterator[tuple[int, str, dict[str, Any] | DataError]]:
    """Yield (row number, location for messages, record) of every row; for a malformed row, its
    DataError."""
    return _parse_lines(chunk) if chunk.kind == "lines" else _parse_arrow(chunk)


def is_blank(line: bytes) -> bool:
    """Say whether a line, given without its newline, holds no row."""
    return not line.strip(JSON_SPACE)


def _parse_lines(chunk: Chunk) -> Iterator[tuple[int, str, dict[str, Any] | DataError]]:
    row = chunk.first_row
    # Two searches of the whole chunk save one or two of each line: most chunks have neither.
    long_integers, nulls = has_long_integers(chunk.payload), b"null" in chunk.payload
    # only \n ends a line: U+2028 and its like stay inside strings
    lines = chunk.payload.split(b"\n")
    bounds = np.cumsum([0, *(len(line) + 1 for line in lines)])
    keys_of_line = most_keys(chunk.payload, bounds)
    for number, (line, keys) in enumerate(zip(lines, keys_of_line, strict=True)):
        if is_blank(line):
            continue
        where = chunk.where(row, None if chunk.first_line is None else chunk.first_line + number)
        record: Any
        try:
            record = parse(line, where, most_keys=keys, exact_integers=long_integers)
            if not isinstance(record, dict):
                record = DataError(
                    f"{where}: the row is of type {type(record).__name__}; expected an object with"
                    " messages"
                )
        except DataError as exc:
            record = exc
        yield row, where, without_nulls(record) if nulls and b"null" in line else record
        row += 1


def _parse_arrow(chunk: Chunk) -> Iterator[tuple[int, str, dict[str, Any] | DataError]]:
    import pyarrow as pa

    with pa.ipc.open_stream(pa.py_buffer(chunk.payload)) as stream:
        table = stream.read_all()
    repeated = [name for name, count in Counter(table.column_names).items() if count > 1]
    records: list[Any]
    try:
        records = table.to_pylist()
    except (ValueError, RecursionError, OverflowError):
        # Python has no value for something in the table: read row by row to find out where.
        records = [None] * table.num_rows
    for offset, record in enumerate(records):
        row = chunk.first_row + offset
        where = chunk.where(row, None)
        try:
            if repeated:
                raise DataError(f"{where}: there are two columns {repeated[0]!r}; keep one of them")
            if record is None:
                (record,) = table.slice(offset, 1).to_pylist()
            check_depth(record, where)
            record = without_nulls(record)
        except DataError as exc:
            record = exc
        except UnicodeDecodeError as exc:
            record = DataError(f"{where}: a string is not valid UTF-8: {exc}; correct the row")
        except (ValueError, RecursionError, OverflowError) as exc:
            record = DataError(f"{where}: a value cannot be read: {exc}; correct the row")
        yield row, where, record
