"""Give tokens the kinds of the text that they cover, and find where each message begins.

    bytes    <|assistant|>\\n\\n\\nHello<|endoftext|>             the answer is "\\n\\nHello"
    tokens   <|  assistant  |  >\\n\\n\\n  Hello  <|endoftext|>
    kind     0   0          0  A|S       A      T

A|S: the token also covers a byte of the header, it STRADDLES the region of the answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt

from prep.rendering.spans import Rendered
from prep.tokenization.byte_offsets import Ints, char_to_byte_offsets
from prep.tokenization.encoder import Encoded
from prep.tokenization.guarded_tokens import BytePositions
from shared.shard_format import STRADDLES, Kind

# If a token covers text of several kinds, the last of them in this list names it: what the model
# must produce wins.
_PRIORITY = (
    Kind.TEMPLATE,
    Kind.SYSTEM,
    Kind.USER,
    Kind.TOOL,
    Kind.TERMINATOR,
    Kind.REASONING,
    Kind.TOOL_CALL,
    Kind.ASSISTANT,
)
# Tokens are painted in blocks: arrays of one entry per token need 8 bytes each.
_BLOCK_TOKENS = 1 << 18


@dataclass(frozen=True, slots=True)
class Aligned:
    """N tokens, R rows, M messages of all rows."""

    kind: npt.NDArray[np.uint8]  # [N]
    message_offsets: Ints  # [M] first token of each message, counted in the chunk
    row_messages: Ints  # [R+1] messages before each row


def align(encoded: Encoded, rows: Sequence[Rendered]) -> Aligned:
    """Return the kind of every token and the first token of every message."""
    spans = _span_table(rows, encoded.byte_offsets)
    # Paint by rising priority, so that the kind with the highest one is painted last and stays.
    priority = np.argsort(np.asarray(_PRIORITY))  # of each kind
    spans = spans[np.argsort(priority[spans["kind"]], kind="stable")]
    first = _search(encoded.token_end, spans["start"], "right")
    last = _search(encoded.token_start, spans["end"], "left")
    kind = np.zeros(len(encoded.tokens), np.uint8)
    message = np.full(len(encoded.tokens), -1, np.int32)
    for block, begin, end in _blocks(first, last):
        block_spans, counts = spans[block], end - begin
        # int64 [sum of counts]: the painted tokens, and for each the index of its span
        span = np.repeat(np.arange(len(block_spans)), counts)
        token = np.repeat(begin - np.cumsum(counts) + counts, counts) + np.arange(len(span))
        outside = (encoded.token_start[token] < block_spans["region_start"][span]) | (
            encoded.token_end[token] > block_spans["region_end"][span]
        )
        kind[token] = block_spans["kind"][span] | np.where(outside, STRADDLES, 0).astype(np.uint8)
        message[token] = block_spans["message"][span]

    # A message begins with the first token that ends behind its start. If that token also covers
    # the message before, it belongs to the one that painted it.
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
    starts = np.clip(starts, encoded.row_offsets[row_of], encoded.row_offsets[row_of + 1])
    return Aligned(kind, starts, row_messages)


def _blocks(first: Ints, last: Ints) -> Iterator[tuple[slice, Ints, Ints]]:
    """Yield spans in order, with the tokens [begin, end) of each: about _BLOCK_TOKENS at a time."""
    counts = np.maximum(last - first, 0)
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = int(ends[start] - counts[start])
        stop = max(start + 1, int(np.searchsorted(ends, before + _BLOCK_TOKENS, side="right")))
        block = slice(start, stop)
        begin, end = first[block], first[block] + counts[block]
        if stop > start + 1 or counts[start] <= _BLOCK_TOKENS:
            yield block, begin, end
        else:
            # one span longer than a block
            for at in range(int(begin[0]), int(end[0]), _BLOCK_TOKENS):
                yield block, np.asarray([at]), np.minimum([at + _BLOCK_TOKENS], end)
        start = stop


def _search(positions: BytePositions, values: Ints, side: Literal["left", "right"]) -> Ints:
    """Search as numpy does, but without its copy of `positions` for values of another type."""
    return np.searchsorted(positions, values.astype(positions.dtype), side=side)


def _span_table(rows: Sequence[Rendered], byte_offsets: Ints) -> npt.NDArray[np.void]:
    """Return all spans of the chunk; positions in bytes, messages counted over the chunk."""
    counts = np.fromiter((len(row.spans) for row in rows), np.int64, len(rows))
    fields = chain.from_iterable(span[:6] for row in rows for span in row.spans)
    flat = np.fromiter(fields, np.int64, 6 * int(counts.sum())).reshape(-1, 6)
    bounds = char_to_byte_offsets(rows, byte_offsets, counts, flat[:, [0, 1, 4, 5]])
    first_message = np.cumsum([0, *(len(row.messages) for row in rows)])[:-1]
    names = ("start", "end", "kind", "message", "region_start", "region_end")
    table = np.zeros(
        len(flat), [(name, np.uint8 if name == "kind" else np.int64) for name in names]
    )
    table["start"], table["end"], table["region_start"], table["region_end"] = bounds.T
    table["kind"] = flat[:, 2]
    table["message"] = np.where(flat[:, 3] < 0, -1, flat[:, 3] + np.repeat(first_message, counts))
    return table
