"""Chunks of raw lines and the builder that turns them into columns, without a store around it."""

from functools import cache
from typing import Any

from rendered_rows import SPECIALS
from trained_tokenizers import CONTROL, tokenizer_json

from prep.conversations.formats import Conversion
from prep.rendering.template import TemplateText, shipped_templates
from prep.sources.chunk import Chunk
from prep.store.chunk_builder import ChunkBuilder, ChunkSpec
from prep.tokenization.encoder import encoder_spec


@cache
def builder(
    template: str, family: str = "byte-level", *, drop_messages: bool = False
) -> ChunkBuilder:
    text = shipped_templates()[template].read_text(encoding="utf-8").removesuffix("\n")
    spec = encoder_spec(
        tokenizer_json(family), CONTROL, "gigatoken" if family == "byte-level" else "transformers"
    )
    return ChunkBuilder(
        ChunkSpec(TemplateText(template, text), SPECIALS, "2026-01-31", spec, (), drop_messages)
    )


def chunk_of(lines: list[bytes], name: Any = "messages") -> Chunk:
    return Chunk(
        source=0, index=0, first_row=0, num_rows=len(lines), file="rows", first_line=1,
        kind="lines",
        payload=b"\n".join(lines), conversion=Conversion(name),
    )  # fmt: skip
