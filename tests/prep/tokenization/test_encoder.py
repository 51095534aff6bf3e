"""Encoding: ids of the Hugging Face tokenizer, byte ranges that add up, and no control token out of
a message."""

import numpy as np
import pytest
from encoded_rows import (
    TEMPLATES,
    a_text,
    encoder,
    no_control,
    reference,
    rendered,
    roles_of,
    row_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_tokenizers import CONTROL, FAMILIES

from prep.rendering.spans import Rendered
from prep.tokenization.byte_offsets import byte_positions
from shared.errors import DataError

GIGATOKEN_TAKES = ["byte-level", "byte-level, NFC"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", TEMPLATES)
@given(rows=st.lists(st.lists(no_control, min_size=1, max_size=4), min_size=1, max_size=3))
@settings(deadline=None, max_examples=25)
def test_ids_and_ranges_are_those_of_the_tokenizer_on_the_rendered_text(
    family: str, template: str, rows: list[list[str]]
) -> None:
    chunk = [rendered(template, contents) for contents in rows]
    encoded = encoder(family).encode(chunk)
    for index, row in enumerate(chunk):
        ids, ranges = row_of(encoded, index)
        expected = reference(family).encode(row.text, add_special_tokens=False)
        assert ids == expected.ids
        byte_at = byte_positions(row.text)
        for (start, end), (first, last) in zip(ranges, expected.offsets, strict=True):
            assert byte_at[first] <= start <= end <= byte_at[last]


@given(contents=st.lists(a_text, min_size=1, max_size=4))
@settings(deadline=None, max_examples=100)
def test_tokens_of_a_byte_level_tokenizer_cover_every_byte_and_spell_the_text(
    contents: list[str],
) -> None:
    row = rendered("chatml", contents)
    ids, ranges = row_of(encoder("byte-level").encode([row]), 0)
    text = row.text.encode()
    assert reference("byte-level").decode(ids, skip_special_tokens=False) == row.text
    covered = np.zeros(len(text), np.int64)
    for start, end in ranges:
        covered[start:end] += 1
    assert (covered >= 1).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", TEMPLATES)
@given(contents=st.lists(a_text, min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_the_only_control_ids_are_those_that_the_template_printed(
    family: str, template: str, contents: list[str]
) -> None:
    row = rendered(template, contents)
    try:
        ids, _ = row_of(encoder(family).encode([row]), 0)
    except DataError:
        # rejected rather than wrong
        return
    without_texts = [{"role": role, "content": ""} for role in roles_of(contents)]
    printed = [
        token
        for text, _ in TEMPLATES[template].account(without_texts)
        for token in control_in(text)
    ]
    controls = {reference(family).token_to_id(token): token for token in CONTROL}
    assert [controls[token] for token in ids if token in controls] == printed


@pytest.mark.parametrize("family", GIGATOKEN_TAKES)
@given(rows=st.lists(st.lists(a_text, min_size=1, max_size=4), max_size=4))
@settings(deadline=None, max_examples=80)
def test_both_backends_give_the_same_tokens_and_ranges(family: str, rows: list[list[str]]) -> None:
    chunk = [rendered("chatml", contents) for contents in rows]
    ours, theirs = (
        encoder(family, backend).encode(chunk) for backend in ("gigatoken", "transformers")
    )
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.token_start.tolist() == theirs.token_start.tolist()
    assert ours.token_end.tolist() == theirs.token_end.tolist()
    assert ours.row_offsets.tolist() == theirs.row_offsets.tolist()
    assert ours.rows_slow_path == theirs.rows_slow_path


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_chunk_and_an_empty_text_have_no_tokens(family: str) -> None:
    assert len(encoder(family).encode([]).tokens) == 0
    encoded = encoder(family).encode(
        [Rendered("", [], []), rendered("chatml", ["a"]), Rendered("", [], [])]
    )
    assert encoded.row_offsets[1] == 0
    assert encoded.row_offsets[2] == encoded.row_offsets[3] == len(encoded.tokens)


def control_in(text: str) -> list[str]:
    return sorted((token for token in CONTROL for _ in range(text.count(token))), key=text.index)
