"""Texts -> 64-bit hashes of their word n-grams: what decides whether two texts share a passage.

A word is a run of letters, marks and digits, in lower case; everything else only separates words. A
Chinese or Japanese character is a word by itself, since nothing separates words there. A text of
fewer than n words is one n-gram, whole: it matches where a whole text consists of the same words,
never inside a longer one. A text of fewer than n // 2 words has no n-gram: "Go on, please." is
nobody's question.

    "Don't stop, 2 x 3!"  ->  don t stop 2 x 3
    n = 4                 ->  "don t stop 2", "t stop 2 x", "stop 2 x 3"

Equal n-grams have equal hashes; different ones have equal hashes with a chance of 2^-64 a pair.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

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
class Ngrams:
    """The n-grams of some texts, in order."""

    hashes: Hashes  # [G]
    text: Ints  # [G] index of the text
    word: Ints  # [G] number of its first word within the text


def word_ngrams(texts: Sequence[str], n: int) -> Ngrams:
    """Return the n-grams of all texts; none crosses from one text to another."""
    word_hashes: list[Hashes] = [np.zeros(0, np.uint64)]
    texts_of_words: list[Ints] = [np.zeros(0, np.int64)]
    for pieces, owners in _blocks(texts):
        points = _code_points("\n".join(pieces))  # the newline separates the words of two pieces
        begin, end = _bounds(points)
        hashes = _range_hashes(splitmix64(points.astype(np.uint64)), begin, end)
        word_hashes.append(splitmix64(hashes))
        piece_ends = np.cumsum([len(piece) + 1 for piece in pieces])
        piece_of = np.searchsorted(piece_ends, begin, side="right")
        texts_of_words.append(np.asarray(owners, np.int64)[piece_of])
    words, text_of = np.concatenate(word_hashes), np.concatenate(texts_of_words)

    # The n-grams are ranges of words: those of n words that end within their text, and short texts.
    ends = np.searchsorted(text_of, np.arange(len(texts)), side="right")  # [texts] in words
    starts = np.concatenate(([0], ends))[:-1]
    index = np.arange(len(words))
    is_short = (ends - starts < n) & (ends - starts >= n // 2)  # [texts]
    is_whole = (index == starts[text_of]) & is_short[text_of]
    # `last - first` is in the hash: n words are never equal to a whole text of fewer.
    first = np.flatnonzero((index + n <= ends[text_of]) | is_whole)
    text = text_of[first]
    last = np.minimum(first + n, ends[text])
    hashes = splitmix64(_range_hashes(words, first, last) + (last - first).astype(np.uint64))
    return Ngrams(hashes, text, first - starts[text])


def words_of(text: str) -> list[str]:
    """Return the words of one text, to show them to people."""
    lowered = text.lower()
    return [lowered[start:end] for start, end in zip(*_bounds(_code_points(lowered)), strict=True)]


class NgramSet:
    """A set of n-gram hashes that many others are looked up in."""

    def __init__(self, hashes: Hashes) -> None:
        self.sorted = np.unique(hashes)  # uint64 [G]
        # The low bits of a hash pick a flag, of which at most one in eight is set: nearly all other
        # hashes are turned away without a search.
        bits = max(16, int(8 * len(self.sorted)).bit_length())
        self._mask = np.uint64((1 << bits) - 1)
        self._maybe = np.zeros(1 << bits, np.bool_)
        self._maybe[self.sorted & self._mask] = True

    def contains(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Say for each hash whether it is in the set, bool [len(hashes)]."""
        is_in: npt.NDArray[np.bool_] = self._maybe[hashes & self._mask]
        candidates = np.flatnonzero(is_in)
        nearest = np.searchsorted(self.sorted, hashes[candidates])
        nearest = np.minimum(nearest, len(self.sorted) - 1)
        is_in[candidates] = self.sorted[nearest] == hashes[candidates]
        return is_in


def _blocks(texts: Sequence[str]) -> Iterator[tuple[list[str], list[int]]]:
    """Yield pieces of text in lower case, at most _BLOCK_CHARS together, and the text of each."""
    pieces: list[str] = []
    owners: list[int] = []
    num_chars = 0
    for index, text in enumerate(texts):
        rest = text.lower()
        while rest:
            end = len(rest)
            if end > _BLOCK_CHARS:
                # Cut a very long text at a space or, without any, where the block is full.
                space = rest.rfind(" ", 1, _BLOCK_CHARS)
                end = space if space > 0 else _BLOCK_CHARS
            if pieces and num_chars + end > _BLOCK_CHARS:
                yield pieces, owners
                pieces, owners, num_chars = [], [], 0
            pieces.append(rest[:end])
            owners.append(index)
            num_chars += end + 1
            rest = rest[end:]
    if pieces:
        yield pieces, owners


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _bounds(points: npt.NDArray[np.uint32]) -> tuple[Ints, Ints]:
    """Return the first and the last-plus-one character of every word."""
    classes = _classes()[points]
    before = np.append(np.uint8(_SEPARATOR), classes)[:-1]
    after = np.append(classes, np.uint8(_SEPARATOR))[1:]
    alone, inside = classes == _WORD_ALONE, classes == _IN_WORD
    starts = alone | (inside & (before != _IN_WORD))
    ends = alone | (inside & (after != _IN_WORD))
    return np.flatnonzero(starts), np.flatnonzero(ends) + 1


def _range_hashes(values: Hashes, starts: Ints, ends: Ints) -> Hashes:
    """Return sum(values[start + k] * FACTOR^k) modulo 2^64 of every range.

    Equal ranges have equal hashes, wherever they lie: with prefix sums of values[i] * FACTOR^i, the
    difference between end and start is that sum times FACTOR^start, and FACTOR has an inverse.
    """
    size = max(len(values), _BLOCK_CHARS + 1)
    powers = _powers(_FACTOR, size)[: len(values)]
    inverse = _powers(pow(_FACTOR, -1, 1 << 64), size)
    total = np.concatenate((np.zeros(1, np.uint64), np.cumsum(values * powers, dtype=np.uint64)))
    return (total[ends] - total[starts]) * inverse[starts]


@lru_cache(maxsize=4)  # both factors, for blocks of characters and for one longer list of words
def _powers(base: int, count: int) -> Hashes:
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
