"""`sft-prep build`: compose the stages, once; an existing set is left alone or refused, never
overwritten by surprise.

inputs -> sample store per source -> selection -> packs -> shards -> manifest, all in a directory
beside, renamed last; what the mixture holds out goes the same way into `eval/` in that directory,
before the manifest.
"""

import contextlib
import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prep.build.choose_encoder import check_fit, check_turns, choose_encoder, plain_kinds
from prep.config import MixtureConfig, SourceConfig
from prep.inputs import KNOWN_DATE, Inputs, resolve_inputs
from prep.progress import progress
from prep.rendering.control.tokens import control_tokens
from prep.rendering.template import ChatTemplate
from prep.selection.decontaminate import Overlap, find_overlaps, read_questions
from prep.selection.eval_split import num_held_out
from prep.selection.mixture import Selections, select_all
from prep.selection.sequences import Selection
from prep.selection.split_sources import SplitSources, check_parts, split_sources, warn_of_no_parts
from prep.sources.chunk import Chunk
from prep.sources.detect_format import conversion_of
from prep.sources.reader import iter_chunks
from prep.store.chunk_builder import ChunkSpec
from prep.store.executors import chunk_workers
from prep.store.sample_store import SampleStore, StoredChunk, StoreRequest, ensure_stores
from prep.store.source_counts import Tally
from prep.tokenization.at_inference import compare_with_inference
from prep.tokenization.encoder import Encoder
from prep.tokenization.tokenizer import LoadedTokenizer, load_tokenizer
from prep.writing import replaceable_set
from prep.writing.manifest import check_budgets, check_selections, write_rejects
from prep.writing.shard_set import Material, Packed, pack, write_set
from shared import atomic
from shared.disk import writing_to
from shared.errors import ArtifactError, DataError
from shared.shard_format import (
    BUILD_INFO_NAME,
    EVAL_DIR,
    MANIFEST_NAME,
    OTHER_PARTS,
    Manifest,
    sealed,
)
from shared.shard_reader import read_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """A mixture and where its set and its samples lie."""

    mixture: MixtureConfig
    base: Path  # the directory that paths in the mixture are relative to
    out: Path
    store: Path
    workers: int
    rehash: bool
    scheduler: str = ""  # address of a Dask scheduler, "" for processes here


def build(plan: BuildPlan, *, rebuild: bool) -> Manifest:
    """Make the shard set, or return the manifest of the one that is there if it was made from the
    same inputs.

    Raises ArtifactError where a set made from other inputs is in the way and `rebuild` is not asked
    for.
    """
    replaceable_set.place_of(plan.out)
    lock = plan.out.parent / f".{plan.out.name}.lock"
    with writing_to(plan.out), atomic.exclusive_lock(lock, f"building {plan.out}"):
        replaceable_set.clear(plan.out)
        if rebuild or (plan.out.is_symlink() and not plan.out.exists()):
            replaceable_set.check_replaceable(plan.out)
        inputs = resolve_inputs(plan.mixture, plan.base, memory_of(plan))
        if not replaceable_set.is_free(plan.out) and not rebuild:
            manifest = _existing(plan.out, inputs)
            logger.info("%s is up to date (%s)", plan.out, manifest.fingerprint[:16])
            return manifest
        return _build(plan, inputs)


def dry_run(plan: BuildPlan) -> list[str]:
    """Tokenise (the samples stay in the store) and pack, and say what a build would write."""
    inputs = resolve_inputs(plan.mixture, plan.base, memory_of(plan))
    loaded = load_tokenizer(inputs.tokenizer, inputs.mixture.tokenizer.add_tokens)
    check_fit(inputs, loaded)
    stores, tallies, _ = _samples(plan, inputs, loaded)
    split = split_sources(inputs, stores, tallies)
    selections = _select(plan, inputs, stores, tallies, split)
    inputs = split.inputs
    lines = [_size_line(plan.out, pack(inputs, selections.train), plan.mixture.max_seq_len)]
    for source, tally, selection in zip(
        inputs.sources, split.tallies, selections.train, strict=True
    ):
        dropped = Counter(selection.dropped)
        rows = tally.rows - dropped.pop(OTHER_PARTS, 0)
        lost = [f"rejected {len(tally.rejects):,}", f"uncarried {len(tally.uncarried):,}"]
        lost += [f"{reason} {count:,}" for reason, count in sorted(dropped.items())]
        lines.append(
            f"  {source.name}: {rows:,} rows, {len(selection.sequences):,} sequences;"
            f" {', '.join(lost)}"
        )
    if selections.num_held_out:
        lines.append(
            _size_line(
                plan.out / EVAL_DIR, pack(inputs, selections.held_out), plan.mixture.max_seq_len
            )
        )
        for source, selection in zip(inputs.sources, selections.held_out, strict=True):
            lines.append(f"  {source.name}: {len(selection.sequences):,} sequences")
    return lines


def _size_line(out: Path, packed: Packed, max_seq_len: int) -> str:
    sequences, packs = packed.sequences, len(packed.pack_offsets) - 1
    tokens, loss_tokens = (
        int(sequences[name].sum(dtype=np.int64)) for name in ("length", "loss_tokens")
    )
    density, size = tokens / (packs * max_seq_len), tokens * 6 / 2**20
    return (
        f"{out} would hold {packs:,} packs of {max_seq_len:,}, {len(sequences):,} sequences,"
        f" {tokens:,} tokens, {loss_tokens:,} loss tokens, density {density:.2%}, about"
        f" {size:,.1f} MiB"
    )


def memory_of(plan: BuildPlan) -> dict[str, Any]:
    """Return what is known of the set that is there: hashes of files that need no second look, and
    its day."""
    known: dict[str, Any] = {}
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # without a memory, files are hashed again
        known = (
            {}
            if plan.rehash
            else dict(json.loads((plan.out / BUILD_INFO_NAME).read_bytes())["known"])
        )
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known[KNOWN_DATE] = json.loads((plan.out / MANIFEST_NAME).read_bytes())["config"][
            "template"
        ]["date"]
    return known


def _existing(out: Path, inputs: Inputs) -> Manifest:
    manifest = read_manifest(out)
    changed = inputs.differences(manifest.inputs)
    if changed:
        raise ArtifactError(
            f"{out} was made from other inputs: {'; '.join(changed)}. Give another --out, or"
            " --rebuild to replace it"
        )
    if num_held_out(manifest):
        read_manifest(out / EVAL_DIR)  # it may have been removed
    return manifest


def _build(plan: BuildPlan, inputs: Inputs) -> Manifest:
    began = time.monotonic()
    loaded = load_tokenizer(inputs.tokenizer, inputs.mixture.tokenizer.add_tokens)
    split_markers = check_fit(inputs, loaded)
    at_inference = _at_inference(inputs, loaded)
    stores, tallies, encoder = _samples(plan, inputs, loaded)
    tokenised = time.monotonic()
    split = split_sources(inputs, stores, tallies)
    selections = _select(plan, inputs, stores, tallies, split)
    inputs = split.inputs
    material = Material(loaded, encoder, split.stores, split.tallies, split_markers)
    packed = pack(inputs, selections.train)
    when_packed = time.monotonic()
    with atomic.staged_dir(plan.out, remove_old=replaceable_set.remove) as aside:
        if selections.num_held_out:
            _write_eval_set(aside / EVAL_DIR, inputs, material, selections.held_out)
        manifest = write_set(aside, inputs, material, selections.train, packed)
        write_rejects(aside, inputs, split.tallies, selections.train)
        seconds = {
            "tokenise": tokenised - began,
            "pack": when_packed - tokenised,
            "write": time.monotonic() - when_packed,
        }
        told = {
            **_build_info(plan, inputs, encoder.spec.backend, seconds),
            "tokenizer_at_inference": at_inference,
        }
        atomic.write_json(aside / BUILD_INFO_NAME, told)
        atomic.write_json(aside / MANIFEST_NAME, sealed(manifest))
    return manifest


def _at_inference(inputs: Inputs, loaded: LoadedTokenizer) -> dict[str, Any]:
    """Return how transformers loads the base model's own tokenizer, without the tokens that the
    mixture adds."""
    own = load_tokenizer(inputs.tokenizer) if loaded.new_ids else loaded
    return compare_with_inference(inputs.tokenizer, own)


def _write_eval_set(
    out: Path, inputs: Inputs, material: Material, selections: list[Selection]
) -> None:
    """Write the rows that are held out as a set of their own."""
    out.mkdir()
    own = inputs.of_eval_set()
    manifest = write_set(out, own, material, selections, pack(own, selections))
    atomic.write_json(out / MANIFEST_NAME, sealed(manifest))


def _samples(
    plan: BuildPlan, inputs: Inputs, loaded: LoadedTokenizer
) -> tuple[list[SampleStore], list[Tally], Encoder]:
    """Return the sample store of every source, what they add up to, and what encoded them."""
    asked = inputs.mixture.tokenizer
    template = ChatTemplate(inputs.template, loaded.special_tokens, inputs.mixture.template.date)
    control = control_tokens(template, loaded.control_tokens, loaded.added_tokens)
    check_turns(inputs, template, control)
    encoder = choose_encoder(loaded, control, plain_kinds(asked.plain_text_roles), asked.backend)
    chunk_spec = ChunkSpec(
        template=inputs.template,
        special_tokens=loaded.special_tokens,
        date=inputs.mixture.template.date,
        encoder=encoder.spec,
        terminators=inputs.mixture.template.terminators,
        drop_messages=inputs.mixture.rows.unknown == "drop_message",
    )
    with writing_to(plan.store):
        tallies = [
            Tally(conversion_of(source, entry, plan.store))
            for source, entry in zip(inputs.sources, inputs.mixture.sources, strict=True)
        ]
        stores = _tokenise(plan, inputs, chunk_spec, tallies)
    check_budgets(inputs, tallies)
    return stores, tallies, encoder


def _tokenise(
    plan: BuildPlan, inputs: Inputs, spec: ChunkSpec, tallies: list[Tally]
) -> list[SampleStore]:
    """Return the sample store of every source, and add up their chunks in `tallies`."""
    read: dict[
        tuple[int, int], int
    ] = {}  # (source, chunk) -> bytes of its files that this chunk ends
    total = sum(file.stamp.size for source in inputs.sources for file in source.files)

    def chunks(index: int) -> Iterator[Chunk]:
        before = 0
        for chunk in iter_chunks(
            inputs.sources[index], source_index=index, conversion=tallies[index].conversion
        ):
            read[index, chunk.index] = max(0, chunk.source_bytes_read - before)
            before = max(before, chunk.source_bytes_read)
            yield chunk

    with (
        progress("tokenising", total, "bytes") as advance,
        chunk_workers(spec, workers=plan.workers, scheduler=plan.scheduler) as workers,
    ):

        def on_chunk(index: int, chunk: StoredChunk) -> None:
            number = int(chunk.path.name.rpartition("-")[2])
            tallies[index].add(chunk.facts)
            _check_rows(inputs, index, tallies[index])
            check_parts(inputs, tallies)
            if number == 0:
                warn_of_no_parts(
                    inputs.sources[index], inputs.mixture.sources[index], tallies[index]
                )
            rows, tokens = (
                sum(tally.rows for tally in tallies),
                sum(tally.tokens for tally in tallies),
            )
            advance(
                read.pop((index, number), 0),
                f"{rows:,} rows, {tokens:,} tokens, {inputs.sources[index].name}",
            )

        requests = [
            StoreRequest(
                plan.store,
                inputs.store_inputs(source, tallies[index].conversion, spec.encoder.backend),
                partial(chunks, index),
            )
            for index, source in enumerate(inputs.sources)
        ]
        return ensure_stores(requests, workers, on_chunk)


def _check_rows(inputs: Inputs, index: int, tally: Tally) -> None:
    """Raise DataError for a row that the mixture says must end the build."""
    policy = inputs.mixture.rows
    if policy.on_error == "stop" and tally.rejects:
        _, reason, detail = tally.rejects[0]
        raise DataError(
            f'{detail} ({reason}); correct the row, or set rows.on_error = "skip" to leave such'
            " rows out"
        )
    if policy.unknown == "error" and tally.uncarried:
        row, reason = tally.uncarried[0]
        raise DataError(
            f"source {inputs.sources[index].name!r} row {row}: the template"
            f" {inputs.template.name!r} cannot carry it "
            f'({reason}); use a template that can, or set rows.unknown = "leave_out"'
        )


def _select(
    plan: BuildPlan,
    inputs: Inputs,
    stores: list[SampleStore],
    tallies: list[Tally],
    split: SplitSources,
) -> Selections:
    asked = inputs.mixture.decontaminate
    overlaps: list[list[Overlap]] = [[] for _ in stores]
    if asked.files:
        plain = SourceConfig(path="")
        questions = [
            (source, conversion_of(source, plain, plan.store)) for source in inputs.questions
        ]
        rows = [
            (source, tally.conversion)
            for source, tally in zip(inputs.sources, tallies, strict=True)
        ]
        with writing_to(plan.store):
            overlaps = find_overlaps(
                rows, read_questions(questions, asked), store=plan.store, workers=plan.workers
            )
    selections = select_all(inputs, stores, overlaps, split)
    check_selections(inputs, selections, tallies)
    return selections


def _build_info(
    plan: BuildPlan, inputs: Inputs, backend: str, seconds: dict[str, float]
) -> dict[str, Any]:
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": inputs.tree["versions"],
        "workers": plan.workers,
        "backend": backend,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "known": inputs.memory(),
    }
