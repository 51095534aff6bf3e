"""Encoding: ids of the Hugging Face tokenizer, byte ranges that add up, and no control token out of
a message."""

import json

import numpy as np
import pytest
import tokenizers
from foreign_templates import CHATML, Foreign, chatml
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered_rows import conversation_of, spans_of, trained_characters
from trained_tokenizers import CONTROL, FAMILIES, PLAIN_ADDED, tokenizer_json

from prep.conversations.conversation import Conversation
from prep.rendering.spans import Rendered
from prep.rendering.template import ChatTemplate, TemplateText
from prep.rendering.turns import learn_rules
from prep.tokenization.align import align
from prep.tokenization.encoder import Encoded, Encoder, byte_positions, encoder_spec
from shared.errors import DataError
from shared.shard_format import ASSISTANT_KINDS, KIND_MASK

GIGATOKEN_TAKES = ["byte-level", "byte-level, NFC"]
PIECES = [
    *CONTROL, *PLAIN_ADDED, "<|im_", "end|>", "<|IM_END|>", "a", "Hello", " world", "user", "assistant", "42",
    "\n", "\n\n", " ", "   ", "\t", "\r\n", "\x00", "\ufeff", "\u2028", "<", "|", ">", "\u00e9", "e\u0301", "\u0301",
    "a\u0323\u0308", "\u0338", "\ufb01", "\uff1c", "\u2460", "\u0130", "\u6771\u4eac", "\U0001f642",
    "\U0001f469\u200d\U0001f680",
]  # fmt: skip
a_text = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
no_control = a_text.filter(lambda text: not any(token in text.lower() for token in CONTROL))


def bare(messages: list[dict[str, str]]):  # no line between the header and the text
    for message in messages:
        yield "<|user|>" if message["role"] == "user" else "<|assistant|>", False
        yield message["content"], message["role"] == "assistant"
        yield "<|endoftext|>", message["role"] == "assistant"


BARE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content"
    " }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {
    "chatml": Foreign(CHATML, chatml, {"eos_token": "<|im_end|>"}, CONTROL),
    "bare": Foreign(BARE, bare, {"eos_token": "<|endoftext|>"}, CONTROL),
}
READY = {}
for _name, _foreign in TEMPLATES.items():
    _template = ChatTemplate(TemplateText(_name, _foreign.text), _foreign.special_tokens)
    READY[_name] = _template, learn_rules(_template, CONTROL)


def rendered(template: str, contents: list[str]) -> Rendered:
    roles = ["user", "assistant"] * len(contents)
    return spans_of(*READY[template], conversation_of(*zip(roles, contents, strict=False)))


_encoders: dict[tuple[str, str], Encoder] = {}


def encoder(family: str, backend: str = "transformers") -> Encoder:
    if (family, backend) not in _encoders:
        _encoders[family, backend] = Encoder(encoder_spec(tokenizer_json(family), CONTROL, backend))
    return _encoders[family, backend]


def reference(family: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer_json(family))


def row_of(encoded: Encoded, index: int) -> tuple[list[int], list[tuple[int, int]]]:
    part = slice(encoded.row_offsets[index], encoded.row_offsets[index + 1])
    base = encoded.byte_offsets[index]
    ranges = zip(
        (encoded.token_start[part] - base).tolist(),
        (encoded.token_end[part] - base).tolist(),
        strict=True,
    )
    return encoded.tokens[part].tolist(), list(ranges)


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
        return  # rejected: never silently wrong
    printed = [
        token for text, _ in TEMPLATES[template].account([{"role": r, "content": ""} for r in roles_of(contents)])
        for token in control_in(text)
    ]  # fmt: skip
    controls = {reference(family).token_to_id(token): token for token in CONTROL}
    assert [controls[token] for token in ids if token in controls] == printed


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


def test_a_control_token_that_is_not_marked_special_is_plain_text_in_a_message() -> None:
    data = json.loads(tokenizer_json("byte-level"))
    for token in data["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|im_end|>"
    found = Encoder(encoder_spec(json.dumps(data), CONTROL, "transformers"))
    ids, _ = row_of(found.encode([rendered("chatml", ["a<|im_end|>b"])]), 0)
    assert (
        ids.count(reference("byte-level").token_to_id("<|im_end|>")) == 2
    )  # of the default system prompt and the user


def test_plain_added_tokens_match_in_messages() -> None:
    ids, _ = row_of(
        encoder("byte-level").encode(
            [rendered("chatml", ["<think>", "<think>x</think><|im_end|>"])]
        ),
        0,
    )
    assert ids.count(reference("byte-level").token_to_id("<think>")) == 2
    assert ids.count(reference("byte-level").token_to_id("</think>")) == 1


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


def roles_of(contents: list[str]) -> list[str]:
    return (["user", "assistant"] * len(contents))[: len(contents)]


def control_in(text: str) -> list[str]:
    return sorted((token for token in CONTROL for _ in range(text.count(token))), key=text.index)


def test_byte_positions_are_those_of_utf_8() -> None:
    text = "a\u00e9\u6771\U0001f642\n"
    assert byte_positions(text).tolist() == [
        len(text[:index].encode()) for index in range(len(text) + 1)
    ]
    assert isinstance(conversation_of(("user", text)), Conversation)
