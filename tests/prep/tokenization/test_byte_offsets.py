"""Positions in bytes: those of UTF-8, for short texts and for long ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.rendering.spans import Rendered
from prep.tokenization import byte_offsets as module
from prep.tokenization.byte_offsets import byte_positions, char_to_byte_offsets

some_text = st.text(st.sampled_from("a\n\u00e9\u07ff\u0800\u6771\uffff\U0001f642"), max_size=12)


def positions(text: str) -> list[int]:
    return [len(text[:index].encode()) for index in range(len(text) + 1)]


@given(text=some_text | st.text(max_size=12))
@settings(deadline=None)
def test_byte_positions_are_those_of_utf_8(text: str) -> None:
    assert byte_positions(text).tolist() == positions(text)


@given(data=st.data(), texts=st.lists(some_text, max_size=4), long=st.integers(1, 20))
@settings(deadline=None)
def test_characters_of_a_row_become_bytes_of_the_chunk_whether_its_text_is_long_or_short(
    data: st.DataObject, texts: list[str], long: int
) -> None:
    rows = [Rendered(text, [], []) for text in texts]
    byte_offsets = np.cumsum([0, *(len(text.encode()) for text in texts)], dtype=np.int64)
    pairs = [
        data.draw(st.lists(st.tuples(*[st.integers(0, len(text))] * 2), max_size=4))
        for text in texts
    ]
    offsets = np.asarray([pair for row in pairs for pair in row], np.int64).reshape(-1, 2)
    counts = np.asarray([len(row) for row in pairs], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LONG", long)
        result = char_to_byte_offsets(rows, byte_offsets, counts, offsets)
    assert result.tolist() == [
        [base + positions(text)[first], base + positions(text)[last]]
        for text, base, row in zip(texts, byte_offsets.tolist(), pairs, strict=False)
        for first, last in row
    ]
