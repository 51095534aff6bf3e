"""Every source of a mixture -> its sample store, tokenised unless that is complete already."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from prep.build.choose_encoder import check_turns, choose_encoder, plain_kinds
from prep.build.limits import check_budgets, check_row
from prep.inputs import Inputs
from prep.progress import progress
from prep.rendering.control.tokens import control_tokens
from prep.rendering.template import ChatTemplate
from prep.selection.source import Source
from prep.selection.split_sources import check_groups, warn_of_no_groups
from prep.sources.chunk import Chunk
from prep.sources.detect_format import conversion_of
from prep.sources.reader import iter_chunks
from prep.store.chunk_builder import ChunkSpec
from prep.store.executors import chunk_workers
from prep.store.sample_store import StoredChunk, StoreRequest, ensure_stores
from prep.store.source_counts import SourceCounts
from prep.tokenization.encoder import Encoder
from prep.tokenization.tokenizer import LoadedTokenizer
from shared.disk import writing_to


def encoder_for(inputs: Inputs, loaded: LoadedTokenizer) -> tuple[ChunkSpec, Encoder]:
    """Return what workers need to turn rows into samples, and the encoder that is part of it.

    Raises ConfigError where the template cannot end a turn with this tokenizer.
    """
    mixture = inputs.mixture
    template = ChatTemplate(inputs.template, loaded.special_tokens, mixture.template.date)
    control = control_tokens(template, loaded.control_tokens, loaded.added_tokens)
    check_turns(inputs, template, control)
    encoder = choose_encoder(
        loaded, control, plain_kinds(mixture.tokenizer.plain_text_roles), mixture.tokenizer.backend
    )
    spec = ChunkSpec(
        template=inputs.template,
        special_tokens=loaded.special_tokens,
        date=mixture.template.date,
        encoder=encoder.spec,
        terminators=mixture.template.terminators,
        drop_messages=mixture.rows.unknown == "drop_message",
    )
    return spec, encoder


def tokenise_sources(
    inputs: Inputs, spec: ChunkSpec, *, store: Path, workers: int, scheduler: str
) -> list[Source]:
    """Return the sources of the mixture with their samples, which lie below `store`.

    Raises DataError for a row that ends the build, and where too many rows are lost.
    """
    with writing_to(store):
        sources = [
            Source(resolved, config, SourceCounts(conversion_of(resolved, config, store)))
            for resolved, config in zip(inputs.sources, inputs.mixture.sources, strict=True)
        ]
        _fill_stores(sources, inputs, spec, store, workers, scheduler)
    check_budgets(sources, inputs.mixture, inputs.template.name)
    return sources


def _fill_stores(
    sources: list[Source],
    inputs: Inputs,
    spec: ChunkSpec,
    store: Path,
    workers: int,
    scheduler: str,
) -> None:
    """Tokenise what the stores lack; every chunk is counted and checked as soon as it is done."""
    chunk_bytes: dict[tuple[int, int], int] = {}  # (source, chunk) -> bytes of its rows
    total = sum(file.stamp.size for source in sources for file in source.resolved.files)

    def chunks(index: int) -> Iterator[Chunk]:
        before, source = 0, sources[index]
        for chunk in iter_chunks(
            source.resolved, source_index=index, conversion=source.counts.conversion
        ):
            chunk_bytes[index, chunk.index] = max(0, chunk.source_bytes_read - before)
            before = max(before, chunk.source_bytes_read)
            yield chunk

    with (
        progress("tokenising", total, "bytes") as advance,
        chunk_workers(spec, workers=workers, scheduler=scheduler) as executor,
    ):

        def on_chunk(index: int, chunk: StoredChunk) -> None:
            source, number = sources[index], int(chunk.path.name.rpartition("-")[2])
            # Every limit is checked with each chunk: a build that must fail does so in seconds.
            source.counts.add(chunk.facts)
            check_row(source, inputs.mixture, inputs.template.name)
            check_groups(sources)
            if number == 0:
                warn_of_no_groups(source)
            rows = sum(source.counts.rows for source in sources)
            tokens = sum(source.counts.tokens for source in sources)
            # A chunk that was in the store already has no bytes to read.
            advance(
                chunk_bytes.pop((index, number), 0),
                f"{rows:,} rows, {tokens:,} tokens, {source.name}",
            )

        requests = [
            StoreRequest(
                store,
                inputs.store_inputs(
                    source.resolved, source.counts.conversion, spec.encoder.backend
                ),
                partial(chunks, index),
            )
            for index, source in enumerate(sources)
        ]
        for source, samples in zip(
            sources, ensure_stores(requests, executor, on_chunk), strict=True
        ):
            source.store = samples
