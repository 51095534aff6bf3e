"""Alignment of real encodings: kinds by byte, messages by row, whatever the chunks and blocks."""

from itertools import pairwise

import numpy as np
import pytest
from encoded_rows import TEMPLATES, a_text, encoder, rendered, roles_of, row_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered_rows import trained_characters
from trained_tokenizers import FAMILIES

from prep.rendering.spans import Rendered, RenderedMessage, Span
from prep.tokenization import align as align_module
from prep.tokenization.align import align
from prep.tokenization.encoder import Encoded
from shared.errors import DataError
from shared.shard_format import ASSISTANT_KINDS, KIND_MASK, Kind


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


@st.composite
def cut_row(draw: st.DrawFn) -> tuple[Rendered, list[tuple[int, int]]]:
    """Messages side by side, without headers, and tokens that cut the row anywhere."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    bounds = np.cumsum([0, *lengths]).tolist()
    kinds = [draw(st.sampled_from([Kind.USER, Kind.ASSISTANT])) for _ in lengths]
    pairs = list(pairwise(bounds))
    spans = [
        Span(start, end, kind, index, start, end, True)
        for index, ((start, end), kind) in enumerate(zip(pairs, kinds, strict=True))
    ]
    messages = [RenderedMessage(index, start) for index, (start, _) in enumerate(pairs)]
    cuts = sorted(draw(st.sets(st.integers(1, bounds[-1]))) | {0, bounds[-1]})
    return Rendered("x" * bounds[-1], spans, messages), list(pairwise(cuts))


@given(rows=st.lists(cut_row(), max_size=3))
@settings(deadline=None, max_examples=300)
def test_a_message_begins_with_a_shared_token_only_if_the_token_is_its_own(
    rows: list[tuple[Rendered, list[tuple[int, int]]]],
) -> None:
    chunk = [row for row, _ in rows]
    byte_offsets = np.cumsum([0, *(len(row.text) for row in chunk)], dtype=np.int64)
    row_offsets = np.cumsum([0, *(len(tokens) for _, tokens in rows)], dtype=np.int64)
    ranges = [
        (first + base, last + base)
        for (_, tokens), base in zip(rows, byte_offsets.tolist(), strict=False)
        for first, last in tokens
    ]
    start, end = np.asarray(ranges, np.int64).reshape(-1, 2).T
    ids = np.zeros(len(start), np.int32)
    aligned = align(Encoded(ids, start, end, row_offsets, byte_offsets, 0), chunk)
    expected = []
    for (row, tokens), base in zip(rows, row_offsets.tolist(), strict=False):
        owners = []
        for first, last in tokens:
            covered = [s for s in row.spans if s.start < last and first < s.end]
            owners.append(max(covered, key=lambda s: (s.kind == Kind.ASSISTANT, s.message)).message)
        for message in row.messages:
            token = next(i for i, (_, last) in enumerate(tokens) if last > message.start)
            is_earlier = owners[token] < message.message and tokens[token][0] < message.start
            expected.append(base + token + is_earlier)
    assert aligned.message_offsets.tolist() == expected
