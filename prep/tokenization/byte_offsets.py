"""Turn positions in characters into positions in bytes: spans count characters, tokens bytes."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from prep.rendering.spans import Rendered

Ints = npt.NDArray[np.int64]

# characters of a text for which one number per character is too much memory
_LONG = 1 << 20


def byte_positions(text: str) -> Ints:
    """Return the byte position of every character and of the end, int64 [len(text) + 1]."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate(([0], np.cumsum(widths)))


def char_to_byte_offsets(
    rows: Sequence[Rendered], byte_offsets: Ints, counts: Ints, offsets: Ints
) -> Ints:
    """Turn characters of rows, int64 [K, n], into bytes of the chunk.

    `counts` [R] says how many of the K belong to each row, `byte_offsets` [R+1] where rows begin.
    """
    ends = np.cumsum(counts)
    result = offsets.copy()
    for index, row in enumerate(rows):
        if row.text.isascii():
            continue
        of_row = slice(ends[index] - counts[index], ends[index])
        if len(row.text) <= _LONG:
            result[of_row] = byte_positions(row.text)[offsets[of_row]]
            continue
        # byte_positions takes 8 bytes for each character. Of a long text only the offsets are
        # turned into bytes, from one to the next; 0 is always among them.
        known = np.union1d(offsets[of_row], np.arange(0, len(row.text), _LONG))
        pieces = (row.text[start:end] for start, end in pairwise(known.tolist()))
        widths = (len(piece.encode("utf-8")) for piece in pieces)
        positions = np.fromiter(accumulate(widths, initial=0), np.int64, len(known))
        result[of_row] = positions[np.searchsorted(known, offsets[of_row])]
    result += np.repeat(byte_offsets[:-1], counts)[:, None]
    return result
