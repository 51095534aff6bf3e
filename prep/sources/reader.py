"""Read the chunks of a resolved source, in order. Decompresses and cuts; workers parse.

A chunk is handed out only if its file is still the one that was hashed, so that nothing read from a
changed file can be stored under the old hash.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import IO, Any, Literal

from prep.conversations.formats import PLAIN_MESSAGES, Conversion
from prep.sources import hub_dataset
from prep.sources.chunk import Chunk
from prep.sources.lines import MAX_BYTES, MAX_LINES, array_groups, decompressed_blocks, line_groups
from prep.sources.resolve import ResolvedSource, SourceFile, SourceStamp
from shared.errors import DataError

# Arrow rows are added to a chunk in steps of so many
_SLICE_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Piece:
    file: str
    first_line: int | None
    num_rows: int
    kind: Literal["lines", "arrow"]
    payload: bytes
    position: int = 0
    """Bytes of the file read so far."""


def iter_chunks(
    source: ResolvedSource, *, source_index: int, conversion: Conversion = PLAIN_MESSAGES
) -> Iterator[Chunk]:
    """Yield the chunks of `source`. Raises DataError for a file that is damaged, cut off or being
    written to."""
    first_row = 0
    # of every file, the bytes of the files before it
    names = (file.name for file in source.files)
    sizes = (file.stamp.size for file in source.files)
    bytes_before = dict(zip(names, accumulate(sizes, initial=0), strict=False))
    if source.hub_id is not None or source.directory is not None:
        pieces = _table_pieces(source, source.hub_id or str(source.directory))
    else:
        pieces = chain.from_iterable(map(_file_pieces, source.files))
    for index, piece in enumerate(pieces):
        yield Chunk(
            source=source_index,
            index=index,
            first_row=first_row,
            num_rows=piece.num_rows,
            file=piece.file,
            first_line=piece.first_line,
            kind=piece.kind,
            payload=piece.payload,
            conversion=conversion,
            source_bytes_read=bytes_before.get(piece.file, 0) + piece.position,
        )
        first_row += piece.num_rows


def _file_pieces(file: SourceFile) -> Iterator[_Piece]:
    try:
        stream = file.path.open("rb")
    except OSError as exc:
        raise DataError(f"{file.name} cannot be read: {exc}") from exc
    with stream:
        _check_unchanged(file, os.fstat(stream.fileno()))
        read = _parquet_pieces if file.format == "parquet" else _line_pieces
        for piece in read(file, stream):
            _check_unchanged(file, os.fstat(stream.fileno()))
            yield piece


def _line_pieces(file: SourceFile, stream: IO[bytes]) -> Iterator[_Piece]:
    blocks = decompressed_blocks(stream, name=file.name, compression=file.compression)
    if file.format == "json":
        for group in array_groups(blocks, name=file.name):
            yield _Piece(file.name, None, group.num_rows, "lines", group.payload, stream.tell())
        return
    first_line = 1
    # blank lines are no rows, but they count when a row is located
    for group in line_groups(blocks):
        if group.num_rows:
            yield _Piece(
                file.name, first_line, group.num_rows, "lines", group.payload, stream.tell()
            )
        first_line += group.num_lines


def _parquet_pieces(file: SourceFile, stream: IO[bytes]) -> Iterator[_Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(stream).iter_batches(batch_size=MAX_LINES)
        yield from _arrow_pieces(file.name, batches)
    except (pa.ArrowException, OSError) as exc:
        raise DataError(
            f"{file.name} cannot be read as Parquet: {exc}; fetch or write the file again"
        ) from exc


def _table_pieces(source: ResolvedSource, location: str) -> Iterator[_Piece]:
    tables = hub_dataset.iter_tables(
        location, split=source.split, revision=source.revision, batch_rows=MAX_LINES
    )
    batches = (batch for table in tables for batch in table.to_batches())
    # `datasets` opens the files by itself: only their paths can be looked at
    for piece in _arrow_pieces(source.name, batches):
        for file in source.files:
            _check_unchanged(file, file.path.stat())
        yield piece


def _arrow_pieces(name: str, batches: Iterable[Any]) -> Iterator[_Piece]:
    """Yield Arrow IPC streams of at most MAX_LINES rows and about MAX_BYTES bytes."""
    # Slices are gathered until one more would exceed a limit.
    rows: list[Any] = []
    num_rows = num_bytes = 0
    for batch in batches:
        for batch_slice in _slices(batch):
            if rows and (
                num_rows + batch_slice.num_rows > MAX_LINES
                or num_bytes + batch_slice.nbytes > MAX_BYTES
            ):
                yield _Piece(name, None, num_rows, "arrow", _ipc_stream(rows))
                rows, num_rows, num_bytes = [], 0, 0
            rows.append(batch_slice)
            num_rows += batch_slice.num_rows
            num_bytes += batch_slice.nbytes
    if rows:
        yield _Piece(name, None, num_rows, "arrow", _ipc_stream(rows))


def _slices(batch: Any) -> Iterator[Any]:
    """Yield a batch in slices of at most MAX_BYTES; a larger row is alone in its slice."""
    for start in range(0, batch.num_rows, _SLICE_ROWS):
        # Halve what is too large. The stack has the first half on top, so rows keep their order.
        stack = [batch.slice(start, _SLICE_ROWS)]
        while stack:
            rows = stack.pop()
            if rows.num_rows == 1 or rows.nbytes <= MAX_BYTES:
                yield rows
                continue
            half = rows.num_rows // 2
            stack += [rows.slice(half), rows.slice(0, half)]


def _ipc_stream(batches: list[Any]) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def _check_unchanged(file: SourceFile, status: os.stat_result) -> None:
    if not SourceStamp.of(status).same_content(file.stamp):
        raise DataError(
            f"{file.path} changed while it was being read; build again when nothing writes to it"
        )
