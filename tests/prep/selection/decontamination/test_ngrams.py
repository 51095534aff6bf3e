"""What words and n-grams are, against a slow reference; equal n-grams have equal hashes."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.selection.decontamination.ngrams import NgramSet, word_ngrams, words_of

TEXTS = st.text(
    alphabet=st.sampled_from("aAbB12 \n.,'-\u4eac\u30ab\u00e9\u0301\u0130\U00020000"), max_size=30
)


def slow_words(text: str) -> list[str]:
    words, inside = [], False
    for character in text.lower():
        if (
            "\u3040" <= character < "\u3100"
            or "\u3400" <= character < "\ua000"
            or character == "\U00020000"
        ):
            words.append(character)
            inside = False
        elif unicodedata.category(character)[0] in "LMN":
            words = [*words[:-1], words[-1] + character] if inside else [*words, character]
            inside = True
        else:
            inside = False
    return words


def slow_ngrams(texts: list[str], n: int) -> list[tuple[int, int, tuple[str, ...]]]:
    ngrams = []
    for index, text in enumerate(texts):
        words = slow_words(text)
        if n // 2 <= len(words) < n and words:
            ngrams.append((index, 0, tuple(words)))
        ngrams += [(index, at, tuple(words[at : at + n])) for at in range(len(words) - n + 1)]
    return ngrams


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6), n=st.integers(1, 5))
def test_ngrams_are_those_of_a_slow_reference_and_hash_apart(texts: list[str], n: int) -> None:
    ngrams, expected = word_ngrams(texts, n), slow_ngrams(texts, n)
    positions = list(zip(ngrams.text.tolist(), ngrams.word.tolist(), strict=True))
    assert positions == [(text, word) for text, word, _ in expected]
    hash_of = dict(zip((words for *_, words in expected), ngrams.hashes.tolist(), strict=True))
    assert [hash_of[words] for *_, words in expected] == ngrams.hashes.tolist()
    assert len(set(hash_of.values())) == len(hash_of)
    assert [words_of(text) for text in texts] == [slow_words(text) for text in texts]


@pytest.mark.parametrize("text", ["word%d " * 3 % (1, 2, 3) * 90_000, "x" * 2_500_000])
def test_a_text_longer_than_a_block_has_the_ngrams_of_its_pieces(text: str) -> None:
    ngrams = word_ngrams([text, "a b c"], 3)
    if " " in text:
        assert len(ngrams.hashes) == 3 * 90_000 - 2 + 1
        assert len(set(ngrams.hashes[:-1].tolist())) == 3
    assert ngrams.hashes[-1] == word_ngrams(["A, b: c!"], 3).hashes[0]


def test_hashes_are_the_same_on_every_machine() -> None:
    hashes = word_ngrams(["Don't stop, 2 x 3!"], 4).hashes.tolist()
    assert hashes == [0x12F2750948ABE4C5, 0x4149821F44A4D77B, 0x9FE3691B636A894B]


@settings(max_examples=50, deadline=None)
@given(
    st.sets(st.integers(0, 2**64 - 1), max_size=30),
    st.lists(st.integers(0, 2**64 - 1), max_size=30),
)
def test_a_set_of_ngrams_contains_what_was_put_in(members: set[int], others: list[int]) -> None:
    # the last differ from members in the highest bit only
    values = [*members, *others, *(value ^ (1 << 63) for value in members)]
    ngrams = NgramSet(np.asarray(sorted(members), np.uint64))
    is_in = ngrams.contains(np.asarray(values, np.uint64))
    assert is_in.tolist() == [value in members for value in values]
