"""Alignment of real encodings: kinds by byte, messages by row, whatever the chunks and blocks."""

import numpy as np
import pytest
from encoded_rows import TEMPLATES, a_text, encoder, rendered, roles_of, row_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered_rows import trained_characters
from trained_tokenizers import FAMILIES

from prep.tokenization import align as align_module
from prep.tokenization.align import align
from shared.errors import DataError
from shared.shard_format import ASSISTANT_KINDS, KIND_MASK


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", TEMPLATES)
@given(contents=st.lists(a_text, min_size=2, max_size=4))
@settings(deadline=None, max_examples=40)
def test_trained_tokens_are_those_whose_bytes_meet_what_the_account_trains(
    family: str, template: str, contents: list[str]
) -> None:
    row = rendered(template, contents)
    mask = "".join(
        ("T" if trained else ".") * len(text)
        for text, trained in TEMPLATES[template].account(
            [{"role": r, "content": c} for r, c in zip(roles_of(contents), contents, strict=True)]
        )
    )
    assert trained_characters(row) == mask
    try:
        encoded = encoder(family).encode([row])
    except DataError:
        return
    of_byte = "".join(
        letter * len(char.encode()) for letter, char in zip(mask, row.text, strict=True)
    )
    kinds = align(encoded, [row]).kind
    for kind, (start, end) in zip(kinds.tolist(), row_of(encoded, 0)[1], strict=True):
        assert ((kind & KIND_MASK) in ASSISTANT_KINDS) == ("T" in of_byte[start:end])


@pytest.mark.parametrize("family", ["byte-level", "byte-level, NFC", "unigram"])
@given(rows=st.lists(st.lists(a_text, max_size=4), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_a_row_is_aligned_in_a_chunk_as_it_is_alone(family: str, rows: list[list[str]]) -> None:
    chunk = [rendered("chatml", contents or ["x"]) for contents in rows]
    try:
        encoded = encoder(family).encode(chunk)
    except DataError:
        return
    aligned = align(encoded, chunk)
    for index, row in enumerate(chunk):
        alone = align(encoder(family).encode([row]), [row])
        tokens = slice(*encoded.row_offsets[index : index + 2])
        messages = slice(*aligned.row_messages[index : index + 2])
        first = encoded.row_offsets[index]
        assert aligned.kind[tokens].tolist() == alone.kind.tolist()
        assert (
            aligned.message_offsets[messages] - first
        ).tolist() == alone.message_offsets.tolist()


@given(rows=st.lists(st.lists(a_text, min_size=1, max_size=4), max_size=3), size=st.integers(1, 9))
@settings(deadline=None, max_examples=100)
def test_the_size_of_the_blocks_does_not_show(rows: list[list[str]], size: int) -> None:
    chunk = [rendered("chatml", contents) for contents in rows]
    encoded = encoder("byte-level").encode(chunk)
    whole = align(encoded, chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align_module, "_BLOCK_TOKENS", size)
        in_blocks = align(encoded, chunk)
    assert np.array_equal(in_blocks.kind, whole.kind)
    assert np.array_equal(in_blocks.message_offsets, whole.message_offsets)


@given(contents=st.lists(a_text, min_size=1, max_size=5))
@settings(deadline=None, max_examples=100)
def test_a_message_begins_with_the_marker_that_opens_it(contents: list[str]) -> None:
    row = rendered("bare", contents)
    encoded = encoder("byte-level").encode([row])
    aligned = align(encoded, [row])
    assert aligned.row_messages.tolist() == [0, len(contents)]
    starts = encoded.token_start[aligned.message_offsets].tolist()
    assert starts == [len(row.text[: m.start].encode()) for m in row.messages]
