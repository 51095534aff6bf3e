"""Spans of text -> kinds of tokens: who wrote each token, and where each message begins.

bytes    <|assistant|>\\n\\n\\nHello<|endoftext|>        the answer is "\\n\\nHello"
tokens   < | assistant | >\\n\\n\\n Hello <eos>
kind     0 0     0     0    A|S      A    T           A|S: it also covers bytes of the header (STRADDLES)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.encode import Encoded, Ints, byte_positions
from prep.spans import Rendered
from shared.shard_format import STRADDLES, Kind

# where one token covers text of two kinds, the later in this list names it: what the model must produce wins
_PRIORITY = (
    Kind.TEMPLATE, Kind.SYSTEM, Kind.USER, Kind.TOOL, Kind.TERMINATOR, Kind.REASONING, Kind.TOOL_CALL, Kind.ASSISTANT,
)  # fmt: skip


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
    first = np.searchsorted(encoded.token_end, spans["start"], side="right")
    last = np.searchsorted(encoded.token_start, spans["end"], side="left")
    counts = np.maximum(last - first, 0)
    owner = np.repeat(np.arange(len(spans)), counts)  # [sum of counts] span of each painted token
    painted = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(len(owner))
    kind = np.zeros(len(encoded.tokens), np.uint8)
    message = np.full(len(encoded.tokens), -1, np.int64)
    outside = (encoded.token_start[painted] < spans["region_start"][owner]) | (
        encoded.token_end[painted] > spans["region_end"][owner]
    )
    kind[painted] = spans["kind"][owner] | np.where(outside, STRADDLES, 0).astype(np.uint8)
    message[painted] = spans["message"][owner]
    return Aligned(kind, *_message_starts(encoded, rows, message))


def _span_table(rows: Sequence[Rendered], byte_offsets: Ints) -> npt.NDArray[np.void]:
    """Return all spans of the chunk in bytes, message numbers counted over the chunk."""
    columns = ("start", "end", "kind", "message", "region_start", "region_end")
    table = np.zeros(
        sum(len(row.spans) for row in rows), [(name, np.uint8 if name == "kind" else np.int64) for name in columns]
    )
    at, messages = 0, 0
    for row, base in zip(rows, byte_offsets[:-1], strict=True):
        if row.spans:
            part = np.asarray([span[:6] for span in row.spans], np.int64)  # [spans, 6]
            positions = byte_positions(row.text)
            block = table[at : at + len(part)]
            for column, name in enumerate(columns):
                if name == "kind":
                    block[name] = part[:, column]
                elif name == "message":
                    block[name] = np.where(part[:, column] < 0, -1, part[:, column] + messages)
                else:
                    block[name] = positions[part[:, column]] + base
            at += len(part)
        messages += len(row.messages)
    return table


def _message_starts(encoded: Encoded, rows: Sequence[Rendered], message: Ints) -> tuple[Ints, Ints]:
    """A message begins with the first token behind the message before it; a shared token belongs to its painter."""
    row_messages = np.concatenate(([0], np.cumsum([len(row.messages) for row in rows], dtype=np.int64)))
    bounds = np.concatenate(
        [byte_positions(row.text)[[m.start for m in row.messages]] + base
         for row, base in zip(rows, encoded.byte_offsets[:-1], strict=True) if row.messages]
        + [np.zeros(0, np.int64)]
    )  # fmt: skip
    starts = np.searchsorted(encoded.token_end, bounds, side="right")
    shared = np.flatnonzero(starts < len(message))
    shared = shared[encoded.token_start[starts[shared]] < bounds[shared]]
    starts[shared] += message[starts[shared]] < shared
    row_of = np.searchsorted(row_messages, np.arange(len(starts)), side="right") - 1
    return np.clip(starts, encoded.row_offsets[row_of], encoded.row_offsets[row_of + 1]), row_messages
