"""Turn the bytes of a file into decompressed blocks, and these into groups of whole lines.

    file -> decompressed_blocks -> line_groups, or array_groups for a JSON array

A line ends at LF and nowhere else. Groups depend on the content alone, not on the blocks.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecoder
from typing import IO, Literal

import numpy as np

from prep.sources.chunk import JSON_SPACE, is_blank
from shared.errors import DataError

MAX_LINES = 4096
MAX_BYTES = 4 << 20
_BLOCK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class LineGroup:
    payload: bytes
    num_lines: int
    num_rows: int
    """Lines that are not blank."""


def decompressed_blocks(
    file: IO[bytes], *, name: str, compression: Literal["", "gz", "zst"]
) -> Iterator[bytes]:
    """Yield the content of `file` block by block. Raises DataError, naming the file, if it is
    damaged or cut off."""
    remedy = "fetch or write the file again"
    try:
        if compression == "zst":
            yield from _zstd_blocks(file)
            return
        stream = gzip.GzipFile(fileobj=file, mode="rb") if compression == "gz" else file
        while block := stream.read(_BLOCK_BYTES):
            yield block
    except EOFError as exc:
        raise DataError(f"{name} ends in the middle of its compressed data; {remedy}") from exc
    except (OSError, zlib.error) as exc:
        raise DataError(f"{name} cannot be read: {exc}; {remedy}") from exc


def line_groups(blocks: Iterator[bytes]) -> Iterator[LineGroup]:
    """Yield groups of at most MAX_LINES whole lines and MAX_BYTES bytes; a longer line is alone.

    A byte order mark at the start of the file is dropped.
    """
    pending = bytearray()
    at_start = True
    # No newline before here, if pending is longer than MAX_BYTES: a line of 100 MB arrives in a
    # hundred blocks, and each of its bytes is searched once.
    searched = 0
    for block in blocks:
        pending += block
        if at_start and len(pending) >= len(_BYTE_ORDER_MARK):
            _drop_mark(pending)
            at_start = False
        while len(pending) >= MAX_BYTES and (end := _group_end(pending, searched)):
            yield _group(bytes(pending[:end]))
            del pending[:end]
            searched = 0
        searched = len(pending) if len(pending) >= MAX_BYTES else 0
    if at_start:
        _drop_mark(pending)
    while pending:
        end = len(pending) if pending.count(b"\n") < MAX_LINES else _group_end(pending, 0)
        yield _group(bytes(pending[:end]))
        del pending[:end]


def array_groups(blocks: Iterator[bytes], *, name: str) -> Iterator[LineGroup]:
    """Yield the elements of a JSON array as lines. The whole text is in memory: arrays do not
    scale."""
    try:
        text = b"".join(blocks).decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DataError(f"{name} is not valid UTF-8: {exc}") from exc
    lines: list[bytes] = []
    num_bytes = 0
    for element in _array_elements(text, name):
        # in valid JSON a raw newline is between tokens only
        line = element.encode().replace(b"\n", b" ")
        if lines and (len(lines) == MAX_LINES or num_bytes + len(line) >= MAX_BYTES):
            yield LineGroup(b"\n".join(lines), len(lines), len(lines))
            lines, num_bytes = [], 0
        lines.append(line)
        num_bytes += len(line) + 1
    if lines:
        yield LineGroup(b"\n".join(lines), len(lines), len(lines))


def _zstd_blocks(file: IO[bytes]) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    # A file may hold several frames. zstandard's stream_reader would take a cut frame for a whole
    # one, so each is decompressed by hand.
    frame = None
    try:
        while data := file.read(_BLOCK_BYTES >> 4):
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
    except zstandard.ZstdError as exc:
        raise OSError(str(exc)) from exc
    if frame is not None:
        raise EOFError


def _drop_mark(pending: bytearray) -> None:
    if pending.startswith(_BYTE_ORDER_MARK):
        del pending[: len(_BYTE_ORDER_MARK)]


def _group_end(pending: bytearray, searched: int) -> int:
    """Return the end of the first group of `pending`, 0 if its first line is not whole yet."""
    # The last newline within both limits; else the line is longer than MAX_BYTES and ends later.
    if searched < MAX_BYTES:
        newlines = _newlines(pending[:MAX_BYTES])
        if len(newlines):
            return int(newlines[min(len(newlines), MAX_LINES) - 1]) + 1
    return pending.find(b"\n", max(searched, MAX_BYTES)) + 1


def _group(payload: bytes) -> LineGroup:
    # int64 [lines], and one past the end if the payload ends in a newline
    starts = np.concatenate(([0], _newlines(payload) + 1))
    starts = starts[starts < len(payload)]
    # Only a line that begins with a space can be blank, so few lines are looked at one by one.
    first_bytes = np.frombuffer(payload, np.uint8)[starts]
    suspects = starts[np.isin(first_bytes, np.frombuffer(JSON_SPACE + b"\n", np.uint8))]
    num_blank = 0
    for start in suspects.tolist():
        end = payload.find(b"\n", start)
        num_blank += is_blank(payload[start : end if end >= 0 else len(payload)])
    return LineGroup(payload, len(starts), len(starts) - num_blank)


def _newlines(data: bytes | bytearray) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))


def _array_elements(text: str, name: str) -> Iterator[str]:
    # Values are not used here: `len` stands for int(), which refuses more than 4300 digits.
    decoder = JSONDecoder(parse_int=len)

    def skip(position: int) -> int:
        match = _SPACE.match(text, position)
        return match.end() if match else position

    position = skip(0)
    if text[position : position + 1] != "[":
        seen = f"begins with {text[position]!r}" if position < len(text) else "is empty"
        raise DataError(
            f"{name} {seen}; expected a JSON array of rows (a file of JSON lines is named .jsonl)"
        )
    position = skip(position + 1)
    separator = text[position : position + 1]
    while separator != "]":
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as exc:
            raise DataError(
                f"{name} is not valid JSON: {exc}; the rows behind it cannot be found"
            ) from exc
        yield text[position:end]
        position = skip(end)
        separator = text[position : position + 1]
        if separator == ",":
            position = skip(position + 1)
        elif separator != "]":
            seen = f"{separator!r} at character {position + 1}"
            raise DataError(
                f"{name} has {seen if separator else 'the end of the file'}; expected ',' or ']'"
                " between its rows"
            )
    if skip(position + 1) < len(text):
        raise DataError(
            f"{name} has more text after its array, at character {position + 2}; expected one array"
            " of rows"
        )
