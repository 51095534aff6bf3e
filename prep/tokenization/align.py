"""Spans of text -> kinds of tokens: who wrote each token, and where each message begins.

bytes    <|assistant|>\\n\\n\\nHello<|endoftext|>        the answer is "\\n\\nHello" tokens   < |
assistant | >\\n\\n\\n Hello <eos> kind     0 0     0     0    A|S      A    T           A|S: it
also covers bytes of the header (STRADDLES)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt

from prep.rendering.spans import Rendered
from prep.tokenization.byte_offsets import char_to_byte_offsets
from prep.tokenization.encoder import Encoded
from prep.tokenization.guarded_tokens import BytePositions, Ints
from shared.shard_format import STRADDLES, Kind

# where one token covers text of two kinds, the later in this list names it: what the model must
# produce wins
_PRIORITY = (
    Kind.TEMPLATE, Kind.SYSTEM, Kind.USER, Kind.TOOL, Kind.TERMINATOR, Kind.REASONING,
    Kind.TOOL_CALL, Kind.ASSISTANT,
)  # fmt: skip


_BLOCK_TOKENS = 1 << 18


@dataclass(frozen=True, slots=True)
class Aligned:
    """N tokens, R rows, M messages of all rows together."""

    kind: npt.NDArray[np.uint8]  # [N]
    message_offsets: Ints  # [M] first token of each message, counted in the chunk
    row_messages: Ints  # [R+1] messages per row, cumulated


def align(encoded: Encoded, rows: Sequence[Rendered]) -> Aligned:
    """Give every token the kind of the text that it covers."""
    spans = _span_table(rows, encoded.byte_offsets)
    rank = np.argsort(np.asarray(_PRIORITY))  # kind -> its place in _PRIORITY
    spans = spans[np.argsort(rank[spans["kind"]], kind="stable")]
    first = _search(encoded.token_end, spans["start"], "right")
    last = _search(encoded.token_start, spans["end"], "left")
    kind = np.zeros(len(encoded.tokens), np.uint8)
    message = np.full(len(encoded.tokens), -1, np.int32)
    for block, begin, end in _blocks(first, last):
        own, counts = spans[block], end - begin
        owner = np.repeat(np.arange(len(own)), counts)  # [sum of counts] span of each painted token
        painted = np.repeat(begin - np.cumsum(counts) + counts, counts) + np.arange(len(owner))
        outside = (encoded.token_start[painted] < own["region_start"][owner]) | (
            encoded.token_end[painted] > own["region_end"][owner]
        )
        kind[painted] = own["kind"][owner] | np.where(outside, STRADDLES, 0).astype(np.uint8)
        message[painted] = own["message"][owner]
    return Aligned(kind, *_message_starts(encoded, rows, message))


def _blocks(first: Ints, last: Ints) -> Iterator[tuple[slice, Ints, Ints]]:
    """Yield spans in order, with the tokens [begin, end) of each: not many more than _BLOCK_TOKENS
    at a time."""
    counts = np.maximum(last - first, 0)
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = int(ends[start] - counts[start])
        stop = max(start + 1, int(np.searchsorted(ends, before + _BLOCK_TOKENS, side="right")))
        block, begin, end = (
            slice(start, stop),
            first[start:stop],
            first[start:stop] + counts[start:stop],
        )
        if stop > start + 1 or counts[start] <= _BLOCK_TOKENS:
            yield block, begin, end
        else:  # one long span
            for at in range(int(begin[0]), int(end[0]), _BLOCK_TOKENS):
                yield block, np.asarray([at]), np.minimum([at + _BLOCK_TOKENS], end)
        start = stop


def _search(places: BytePositions, wanted: Ints, side: Literal["left", "right"]) -> Ints:
    """Search as numpy does, which would copy `places` if `wanted` were of another type."""
    return np.searchsorted(places, wanted.astype(places.dtype), side=side)


def _span_table(rows: Sequence[Rendered], byte_offsets: Ints) -> npt.NDArray[np.void]:
    """Return all spans of the chunk in bytes, message numbers counted over the chunk."""
    counts = np.fromiter((len(row.spans) for row in rows), np.int64, len(rows))
    fields = chain.from_iterable(span[:6] for row in rows for span in row.spans)
    flat = np.fromiter(fields, np.int64, 6 * int(counts.sum())).reshape(-1, 6)
    places = char_to_byte_offsets(rows, byte_offsets, counts, flat[:, [0, 1, 4, 5]])
    first_message = np.cumsum([0, *(len(row.messages) for row in rows)])[:-1]
    names = ("start", "end", "kind", "message", "region_start", "region_end")
    table = np.zeros(
        len(flat), [(name, np.uint8 if name == "kind" else np.int64) for name in names]
    )
    table["start"], table["end"], table["region_start"], table["region_end"] = places.T
    table["kind"] = flat[:, 2]
    table["message"] = np.where(flat[:, 3] < 0, -1, flat[:, 3] + np.repeat(first_message, counts))
    return table


def _message_starts(
    encoded: Encoded, rows: Sequence[Rendered], message: npt.NDArray[np.int32]
) -> tuple[Ints, Ints]:
    """A message begins with the first token behind the message before it; a shared token belongs to
    its painter."""
    counts = np.fromiter((len(row.messages) for row in rows), np.int64, len(rows))
    row_messages = np.concatenate(([0], np.cumsum(counts)))
    begins = np.fromiter(
        (m.start for row in rows for m in row.messages), np.int64, int(counts.sum())
    )
    bounds = char_to_byte_offsets(rows, encoded.byte_offsets, counts, begins[:, None])[:, 0]
    starts = _search(encoded.token_end, bounds, "right")
    shared = np.flatnonzero(starts < len(message))
    shared = shared[encoded.token_start[starts[shared]] < bounds[shared]]
    starts[shared] += message[starts[shared]] < shared
    row_of = np.searchsorted(row_messages, np.arange(len(starts)), side="right") - 1
    return (
        np.clip(starts, encoded.row_offsets[row_of], encoded.row_offsets[row_of + 1]),
        row_messages,
    )
