"""Texts -> 64-bit hashes of their word n-grams. What decides whether two texts share a passage.

A word is a run of letters, marks and digits, in lower case; everything else only separates words. A
Chinese or Japanese character is a word of its own, since nothing separates words there. A text of
fewer than n words is one gram, whole: it is found where a whole text consists of the same words,
never inside a longer one. One of fewer than n // 2 words has no gram: "Go on, please." is nobody's
question.

"Don't stop, 2 x 3!"  ->  don t stop 2 x 3  ->  n = 4: "don t stop 2", "t stop 2 x", "stop 2 x 3"

Equal grams have equal hashes; different ones have equal hashes with a chance of 2^-64 a pair.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from shared.splitmix import splitmix64

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_BLOCK_CHARS = 1 << 20  # of text that is hashed at once, at about 50 bytes of memory each
_FACTOR = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
_ALONE = ((0x3040, 0x3100), (0x3400, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32000))  # kana and Han
_SEPARATOR, _IN_WORD, _WORD_ALONE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Grams:
    """The grams of some texts, in order."""

    hashes: Hashes  # [G]
    text: Ints  # [G] index of the text
    word: Ints  # [G] number of its first word within the text


def word_grams(texts: Sequence[str], n: int) -> Grams:
    """Return the n-grams of all texts; none crosses from one text to another."""
    words, text_of = _word_hashes(texts)
    ends = np.searchsorted(text_of, np.arange(len(texts)), side="right")  # [texts] in words
    starts = np.concatenate(([0], ends[:-1])) if len(texts) else ends
    at = np.arange(len(words))
    length = ends - starts
    is_whole = (at == starts[text_of]) & ((length < n) & (length >= n // 2))[text_of]
    first = np.flatnonzero((at + n <= ends[text_of]) | is_whole)
    text = text_of[first]
    last = np.minimum(first + n, ends[text])
    hashes = splitmix64(_range_hashes(words, first, last) + (last - first).astype(np.uint64))
    return Grams(hashes, text, first - starts[text])


def words_of(text: str) -> list[str]:
    """Return the words of one text: what people are shown."""
    lowered = text.lower()
    classes = _classes()[np.frombuffer(lowered.encode("utf-32-le", "surrogatepass"), np.uint32)]
    return [lowered[start:end] for start, end in zip(*_bounds(classes), strict=True)]


class GramSet:
    """A set of gram hashes that many others are looked up in."""

    def __init__(self, hashes: Hashes) -> None:
        self.sorted = np.unique(hashes)  # uint64 [G]
        bits = max(16, int(8 * len(self.sorted)).bit_length())
        self._mask = np.uint64((1 << bits) - 1)
        self._maybe = np.zeros(1 << bits, np.bool_)  # turns nearly all others away without a search
        self._maybe[self.sorted & self._mask] = True

    def contains(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Say for each hash whether it is in the set, bool [len(hashes)]."""
        found: npt.NDArray[np.bool_] = self._maybe[hashes & self._mask]
        candidates = np.flatnonzero(found)
        place = np.searchsorted(self.sorted, hashes[candidates])
        found[candidates] = (
            self.sorted[np.minimum(place, len(self.sorted) - 1)] == hashes[candidates]
        )
        return found


def _word_hashes(texts: Sequence[str]) -> tuple[Hashes, Ints]:
    """Return the hash of every word and the index of its text."""
    hashes: list[Hashes] = [np.zeros(0, np.uint64)]
    text_of: list[Ints] = [np.zeros(0, np.int64)]
    block: list[str] = []
    owners: list[int] = []
    chars = 0

    def close() -> None:
        points = np.frombuffer("\n".join(block).encode("utf-32-le", "surrogatepass"), np.uint32)
        starts, ends = _bounds(_classes()[points])
        hashes.append(splitmix64(_range_hashes(splitmix64(points.astype(np.uint64)), starts, ends)))
        piece_ends = np.cumsum([len(piece) + 1 for piece in block])
        text_of.append(
            np.asarray(owners, np.int64)[np.searchsorted(piece_ends, starts, side="right")]
        )

    for index, text in enumerate(texts):
        for piece in _pieces(text.lower()):
            if block and chars + len(piece) > _BLOCK_CHARS:
                close()
                block, owners, chars = [], [], 0
            block.append(piece)
            owners.append(index)
            chars += len(piece) + 1
    if block:
        close()
    return np.concatenate(hashes), np.concatenate(text_of)


def _pieces(text: str) -> list[str]:
    """Cut a very long text at spaces (or, without any, where the block is full)."""
    pieces = []
    while len(text) > _BLOCK_CHARS:
        end = text.rfind(" ", 1, _BLOCK_CHARS)
        end = end if end > 0 else _BLOCK_CHARS
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


def _bounds(classes: npt.NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Return first and last-plus-one character of every word."""
    before = np.concatenate((np.zeros(1, np.uint8), classes))[:-1]
    after = np.concatenate((classes, np.zeros(1, np.uint8)))[1:]
    alone = classes == _WORD_ALONE
    starts = alone | ((classes == _IN_WORD) & (before != _IN_WORD))
    ends = alone | ((classes == _IN_WORD) & (after != _IN_WORD))
    return np.flatnonzero(starts), np.flatnonzero(ends) + 1


def _range_hashes(values: Hashes, starts: Ints, ends: Ints) -> Hashes:
    """Return sum(values[start + k] * FACTOR^k) modulo 2^64 of every range: equal for equal ranges,
    wherever they lie.

    Of prefix sums of values[i] * FACTOR^i the difference is that sum times FACTOR^start, and FACTOR
    has an inverse.
    """
    powers = _powers(_FACTOR, len(values))
    inverse = _powers(pow(_FACTOR, -1, 1 << 64), len(values))
    total = np.concatenate((np.zeros(1, np.uint64), np.cumsum(values * powers, dtype=np.uint64)))
    return (total[ends] - total[starts]) * inverse[starts]


def _powers(base: int, count: int) -> Hashes:
    usual = _BLOCK_CHARS + 1
    return _usual_powers(base)[:count] if count <= usual else _compute_powers(base, count)


@cache
def _usual_powers(base: int) -> Hashes:
    return _compute_powers(base, _BLOCK_CHARS + 1)


def _compute_powers(base: int, count: int) -> Hashes:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


@cache
def _classes() -> npt.NDArray[np.uint8]:
    """Return what every character does, uint8 [0x110000]."""
    letters = (unicodedata.category(chr(point))[0] in "LMN" for point in range(0x110000))
    classes = np.fromiter(letters, np.uint8, 0x110000)
    for first, end in _ALONE:
        classes[first:end] *= _WORD_ALONE
    return classes
