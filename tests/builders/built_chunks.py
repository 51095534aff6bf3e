"""Rows through template and tokenizer in this process, for tests: raw rows to the columns of a
sample store."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from prep.build.choose_encoder import plain_kinds
from prep.rendering.control.tokens import control_tokens
from prep.rendering.template import ChatTemplate, TemplateText
from prep.sources.chunk import Chunk
from prep.store.chunk_builder import ChunkBuilder, ChunkResult, ChunkSpec
from prep.tokenization.encoder import encoder_spec
from shared.shard_format import ASSISTANT_KINDS, KIND_MASK


def chunk_of(rows: list[dict[str, Any]]) -> Chunk:
    payload = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return Chunk(
        source=0,
        index=0,
        first_row=0,
        num_rows=len(rows),
        file="rows",
        first_line=1,
        kind="lines",
        payload=payload,
    )


def builder_of(
    text: str,
    tokenizer_json: str,
    specials: dict[str, str],
    *,
    backend: str = "gigatoken",
    terminators: tuple[str, ...] = (),
    plain_roles: tuple[str, ...] = (),
) -> ChunkBuilder:
    """Return a builder whose control tokens are found as a build finds them."""
    template = TemplateText("test", text)
    added = {
        token["content"]: token["special"] for token in json.loads(tokenizer_json)["added_tokens"]
    }
    always = {token for token, special in added.items() if special} | {specials["eos_token"]}
    control = control_tokens(ChatTemplate(template, specials), tuple(sorted(always)), added)
    spec = encoder_spec(tokenizer_json, control, backend, plain_kinds(plain_roles))
    return ChunkBuilder(ChunkSpec(template, specials, "", spec, terminators, False))


def samples_of(made: ChunkResult) -> Iterator[tuple[int, list[int], np.ndarray]]:
    """Yield (row, ids, which of them an assistant's turn trains) of every sample."""
    bounds = made.columns["sample_offsets"].tolist()
    for row, start, end in zip(
        made.columns["sample_row"].tolist(), bounds, bounds[1:], strict=False
    ):
        kinds = made.columns["kind"][start:end] & KIND_MASK
        yield row, made.columns["tokens"][start:end].tolist(), np.isin(kinds, ASSISTANT_KINDS)
