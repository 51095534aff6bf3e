"""Guarded tokens: what somebody typed stays plain text, what the template printed stays a token."""

import json

import numpy as np
import pytest
import tokenizers
from encoded_rows import a_text, encoder, reference, rendered, row_of
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_tokenizers import CONTROL, tokenizer_json

from prep.tokenization import guarded_tokens
from prep.tokenization.encoder import Encoder, encoder_spec
from prep.tokenization.guarded_tokens import GuardedTokens, look_up
from shared.errors import DataError
from shared.shard_format import Kind

TAGS = ("<think>", "</think>")


def guarded(
    family: str, control: tuple[str, ...] = CONTROL, plain_kinds: tuple[Kind, ...] = ()
) -> GuardedTokens:
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json(family))
    vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    data = json.loads(tokenizer_json(family))
    return GuardedTokens(tokenizer, data, control, plain_kinds, vocab_size)


@pytest.mark.parametrize("family", ["byte-level", "byte-level, lstrip", "sentencepiece, first"])
@given(contents=st.lists(st.sampled_from([*TAGS, "a", " ", *CONTROL]), min_size=2, max_size=9))
@settings(deadline=None, max_examples=40)
def test_markup_is_a_token_in_the_assistants_texts_and_plain_text_in_the_users(
    family: str, contents: list[str]
) -> None:
    row = rendered("chatml", contents)
    ids, _ = encoder(family, plain_kinds=(Kind.USER,)).reference(row)
    for tag in TAGS:
        expected = sum(text == tag for text in contents[1::2])
        assert ids.tolist().count(reference(family).token_to_id(tag)) == expected


@pytest.mark.parametrize("kinds", [(), (Kind.USER,), (Kind.USER, Kind.ASSISTANT)])
@given(rows=st.lists(st.lists(a_text, min_size=1, max_size=4), max_size=4))
@settings(deadline=None, max_examples=40)
def test_a_token_of_a_chunk_is_typed_if_it_shares_a_byte_with_text_that_may_not_become_it(
    kinds: tuple[Kind, ...], rows: list[list[str]]
) -> None:
    chunk = [rendered("chatml", contents) for contents in rows]
    texts = [row.text.encode() for row in chunk]
    byte_offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    ids: list[int] = []
    ranges: list[tuple[int, int]] = []
    expected: list[int] = []
    for row, base in zip(chunk, byte_offsets.tolist(), strict=False):
        encoding = reference("byte-level").encode(row.text, add_special_tokens=False)
        for index, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            token = reference_token(index)
            forbidden = [
                span
                for span in row.spans
                if span.is_text
                and (token in CONTROL or (token in TAGS and span.kind in kinds))
                and span.start < last
                and first < span.end
            ]
            if forbidden:
                expected.append(len(ids))
            ids.append(index)
            start, end = (base + len(row.text[:position].encode()) for position in (first, last))
            ranges.append((start, end))
    start, end = np.asarray(ranges, np.int64).reshape(-1, 2).T
    made = guarded("byte-level", plain_kinds=kinds)
    typed = made.typed_in_chunk(np.asarray(ids, np.int32), start, end, chunk, byte_offsets)
    assert sorted(typed.tolist()) == expected


_TOKENS: dict[int, str] = {}


def reference_token(index: int) -> str:
    if not _TOKENS:
        vocab = reference("byte-level").get_vocab(with_added_tokens=True)
        _TOKENS.update({number: token for token, number in vocab.items()})
    return _TOKENS[index]


@pytest.mark.parametrize(
    "family", ["byte-level", "byte-level, NFC", "sentencepiece, first", "unigram"]
)
@pytest.mark.parametrize("typed", CONTROL)
def test_a_row_with_a_typed_control_token_is_not_rejected(family: str, typed: str) -> None:
    row = rendered("chatml", [f"a{typed}b", f"{typed} {typed}"])
    ids, _ = row_of(encoder(family).encode([row]), 0)
    assert len(ids) > 10


def test_a_typed_control_token_among_stand_ins_is_rejected() -> None:
    row = rendered("chatml", ["a<|im_end|>\U0010f000"])
    with pytest.raises(DataError, match="private-use"):
        encoder("byte-level").encode([row])


def test_a_control_token_without_an_id_is_rejected() -> None:
    with pytest.raises(DataError, match=r"names '<\|none\|>' as a special token but has no id"):
        guarded("byte-level", (*CONTROL, "<|none|>"))


def test_a_control_token_that_is_not_marked_special_is_plain_text_in_a_message() -> None:
    data = json.loads(tokenizer_json("byte-level"))
    for token in data["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|im_end|>"
    made = Encoder(encoder_spec(json.dumps(data), CONTROL, "transformers"))
    ids, _ = row_of(made.encode([rendered("chatml", ["a<|im_end|>b"])]), 0)
    # of the default system prompt and of the user's message
    assert ids.count(reference("byte-level").token_to_id("<|im_end|>")) == 2


def test_plain_added_tokens_match_in_messages() -> None:
    row = rendered("chatml", ["<think>", "<think>x</think><|im_end|>"])
    ids, _ = row_of(encoder("byte-level").encode([row]), 0)
    assert ids.count(reference("byte-level").token_to_id("<think>")) == 2
    assert ids.count(reference("byte-level").token_to_id("</think>")) == 1


@given(
    ids=st.lists(st.integers(0, 99), max_size=40),
    block_tokens=st.integers(1, 50),
)
@settings(deadline=None)
def test_looking_up_in_blocks_is_indexing(ids: list[int], block_tokens: int) -> None:
    table = np.arange(100)[::-1] ** 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guarded_tokens, "_BLOCK_TOKENS", block_tokens)
        values = look_up(table, np.asarray(ids, np.int32))
    assert values.tolist() == [int(table[index]) for index in ids]


def test_an_unknown_character_of_an_answer_does_not_stop_a_row_with_typed_markup() -> None:
    row = rendered("chatml", ["<think>", "a\ufeff"])
    made = guarded("unigram", plain_kinds=(Kind.USER,))
    ids, offsets = made.encode(row)
    position = row.text.index("\ufeff")
    unknown = offsets[ids == reference("unigram").token_to_id("<unk>")]
    assert [position, position + 1] in unknown.tolist()


def test_typed_markup_is_plain_text_too_where_there_are_no_control_tokens() -> None:
    row = rendered("chatml", ["<think>", "<think>"])
    ids, _ = guarded("byte-level", (), (Kind.USER,)).encode(row)
    assert ids.tolist().count(reference("byte-level").token_to_id("<think>")) == 1
