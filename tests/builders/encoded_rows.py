"""Rendered rows of odd texts, and encoders of the trained tokenizers, made once."""

from functools import cache

import tokenizers
from foreign_templates import CHATML, Foreign, chatml
from hypothesis import strategies as st
from rendered_rows import conversation_of, spans_of
from trained_tokenizers import CONTROL, PLAIN_ADDED, tokenizer_json

from prep.rendering.spans import Rendered
from prep.rendering.template import ChatTemplate, TemplateText
from prep.rendering.turns import learn_rules
from prep.tokenization.encoder import Encoded, Encoder, encoder_spec
from shared.shard_format import Kind

# texts that tokenizers split, normalize or match whole in different ways
PIECES = [
    *(*CONTROL, *PLAIN_ADDED, "<|im_", "end|>", "<|IM_END|>", "a", "Hello", " world", "user"),
    *("assistant", "42", "\n", "\n\n", " ", "   ", "\t", "\r\n", "\x00", "\ufeff", "\u2028"),
    *("<", "|", ">", "\u00e9", "e\u0301", "\u0301", "a\u0323\u0308", "\u0338", "\ufb01", "\uff1c"),
    *("\u2460", "\u0130", "\u6771\u4eac", "\U0001f642", "\U0001f469\u200d\U0001f680"),
]
a_text = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
no_control = a_text.filter(lambda text: not any(token in text.lower() for token in CONTROL))


def bare(messages: list[dict[str, str]]):
    """The account of a template without a line break between header and text."""
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
_READY = {}
for _name, _foreign in TEMPLATES.items():
    _template = ChatTemplate(TemplateText(_name, _foreign.text), _foreign.special_tokens)
    _READY[_name] = _template, learn_rules(_template, CONTROL)


def roles_of(contents: list[str]) -> list[str]:
    return (["user", "assistant"] * len(contents))[: len(contents)]


def rendered(template: str, contents: list[str]) -> Rendered:
    """A conversation of user and assistant by turns, rendered with its spans."""
    pairs = zip(roles_of(contents), contents, strict=True)
    return spans_of(*_READY[template], conversation_of(*pairs))


@cache
def encoder(
    family: str, backend: str = "transformers", plain_kinds: tuple[Kind, ...] = ()
) -> Encoder:
    return Encoder(encoder_spec(tokenizer_json(family), CONTROL, backend, plain_kinds))


def reference(family: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer_json(family))


def row_of(encoded: Encoded, index: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a row of a chunk, and their bytes in the row."""
    tokens = slice(encoded.row_offsets[index], encoded.row_offsets[index + 1])
    base = encoded.byte_offsets[index]
    starts = (encoded.token_start[tokens] - base).tolist()
    ends = (encoded.token_end[tokens] - base).tolist()
    return encoded.tokens[tokens].tolist(), list(zip(starts, ends, strict=True))
