"""Any messages, any shipped template, any tokenizer: raw row to loss mask, against transformers'
own accounts of both.

What to train is what transformers says the template's generation blocks printed; which tokens that
is, is what the offsets of `tokenizers` say.
"""

import json
from functools import cache

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered_rows import SPECIALS
from trained_tokenizers import CONTROL, PLAIN_ADDED, tokenizer_json
from transformers.utils.chat_template_utils import render_jinja_template

from prep.config import MaskConfig
from prep.rendering.template import TemplateText, shipped_templates
from prep.selection.loss_mask import loss_mask_of
from prep.sources.chunk import Chunk
from prep.store.chunk_builder import ChunkBuilder, ChunkSpec
from prep.store.samples import Samples
from prep.tokenization.encoder import encoder_spec

FAMILIES = ["byte-level", "byte-level, NFC", "sentencepiece, first", "unigram"]
TEMPLATES = {
    name: path.read_text(encoding="utf-8").removesuffix("\n")
    for name, path in shipped_templates().items()
}
PIECES = [
    *PLAIN_ADDED, "a", "Hello", " world", "user", "assistant", "42", "<|im_", "end|>", "[/INST]",
    "</s>", "\n", "\n\n",
    " ", "   ", "\t", "\r\n", "\ufeff", "\u2028", "<", "|", ">", "\u00e9", "e\u0301", "\ufb01",
    "\u6771\u4eac",
    "\U0001f469\u200d\U0001f680",
]  # fmt: skip
a_text = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
no_control = a_text.filter(lambda text: not any(token in text for token in CONTROL))


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": draw(no_control)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(no_control)})
        messages.append({"role": "assistant", "content": draw(no_control)})
    return messages


@cache
def builder(template: str, family: str) -> ChunkBuilder:
    backend = "gigatoken" if family.startswith("byte-level") else "transformers"
    spec = encoder_spec(tokenizer_json(family), CONTROL, backend)
    return ChunkBuilder(
        ChunkSpec(
            TemplateText(template, TEMPLATES[template]), SPECIALS, "2026-01-31", spec, (), False
        )
    )


@given(
    rows=st.lists(conversations(), min_size=1, max_size=4),
    template=st.sampled_from(sorted(TEMPLATES)),
    family=st.sampled_from(FAMILIES),
)
@settings(deadline=None, max_examples=150)
def test_the_mask_of_a_row_is_what_transformers_says_its_generation_blocks_print(
    rows: list[list[dict[str, str]]], template: str, family: str
) -> None:
    payload = "".join(json.dumps({"messages": messages}) + "\n" for messages in rows).encode()
    chunk = Chunk(
        source=0,
        index=0,
        first_row=0,
        num_rows=len(rows),
        file="rows",
        first_line=1,
        kind="lines",
        payload=payload,
    )
    made = builder(template, family).build(chunk)
    columns = made.columns
    left_out = {row for row, *_ in [*made.facts["rejects"], *made.facts["unrendered"]]}
    assert columns["sample_row"].tolist() == [
        row for row in range(len(rows)) if row not in left_out
    ]
    names = (
        "kind",
        "sample_offsets",
        "sample_messages",
        "message_offsets",
        "message_role",
        "message_train",
    )
    mask = loss_mask_of(Samples(*(columns[name] for name in names)), MaskConfig())
    bounds = columns["sample_offsets"].tolist()
    for row, start, end in zip(columns["sample_row"].tolist(), bounds, bounds[1:], strict=False):
        (text,), (blocks,) = render_jinja_template(
            [rows[row]],
            chat_template=TEMPLATES[template],
            return_assistant_tokens_mask=True,
            **SPECIALS,
        )
        encoding = tokenizers.Tokenizer.from_str(tokenizer_json(family)).encode(
            text, add_special_tokens=False
        )
        assert columns["tokens"][start:end].tolist() == encoding.ids
        expected = [
            any(max(a, first) < min(b, last) for a, b in blocks) for first, last in encoding.offsets
        ]
        assert mask[start:end].tolist() == [0, *map(int, expected[1:])]
