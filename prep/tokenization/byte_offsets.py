"""Character positions of rendered rows -> byte positions. Spans count characters, tokens count
bytes."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from prep.rendering.spans import Rendered

Ints = npt.NDArray[np.int64]

_LONG = 1 << 20  # characters: a longer text is not spelled out in numbers


def byte_positions(text: str) -> Ints:
    """Return the byte position of every character of `text` and of its end, int64 [len(text) +
    1]."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate(([0], np.cumsum(widths)))


def char_to_byte_offsets(
    rows: Sequence[Rendered], byte_offsets: Ints, counts: Ints, places: Ints
) -> Ints:
    """Turn characters of rows, int64 [K, n], into bytes of the chunk; `counts` says how many of K
    are each row's."""
    ends = np.cumsum(counts)
    result = places.copy()
    for index, row in enumerate(rows):
        if not row.text.isascii():
            part = slice(ends[index] - counts[index], ends[index])
            result[part] = _bytes_at(row.text, places[part])
    result += np.repeat(byte_offsets[:-1], counts)[:, None]
    return result


def _bytes_at(text: str, places: Ints) -> Ints:
    if len(text) <= _LONG:
        return byte_positions(text)[places]
    known = np.union1d(places, np.arange(0, len(text), _LONG))  # 0 is one of them
    widths = (len(text[start:end].encode("utf-8")) for start, end in pairwise(known.tolist()))
    return np.fromiter(accumulate(widths, initial=0), np.int64, len(known))[
        np.searchsorted(known, places)
    ]
