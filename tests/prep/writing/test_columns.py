"""The columns of a set are the sequences' own tokens, kinds and masks, whatever the size of shards
and blocks."""

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.config import MaskConfig
from prep.selection.sequences import SEQUENCE
from prep.store.chunk_builder import COLUMNS
from prep.store.sample_store import SampleStore, StoredChunk
from prep.writing import columns
from prep.writing.columns import assemble, count_terminators
from shared.shard_format import COLUMNS as SHARD_COLUMNS
from shared.shard_format import KIND_MASK, Kind

Columns = dict[str, np.ndarray]


def write_chunk(folder: Path, lengths: list[int], draw: np.random.Generator) -> StoredChunk:
    """Write samples of one message each, an assistant's, with random tokens; one token in three
    ends the turn."""
    folder.mkdir(parents=True)
    total, count = sum(lengths), len(lengths)
    offsets = np.cumsum([0, *lengths])
    written: dict[str, object] = {
        "tokens": draw.integers(0, 50, total),
        "kind": draw.choice([int(Kind.USER), int(Kind.ASSISTANT), int(Kind.TERMINATOR)], total),
        "sample_offsets": offsets,
        "sample_row": np.arange(count),
        "sample_messages": np.arange(count + 1),
        "message_offsets": offsets[:-1],
        "message_role": [int(Kind.ASSISTANT)] * count,
        "message_train": [2] * count,
    }
    for name, values in written.items():
        dtype, tail = COLUMNS[name]
        np.save(folder / f"{name}.npy", np.asarray(values).astype(dtype).reshape(-1, *tail))
    return StoredChunk(folder)


def sequences_of(store: SampleStore, draw: np.random.Generator) -> np.ndarray:
    """Return two fragments of every sample of two tokens and more."""
    rows = []
    for index, chunk in enumerate(store.chunks):
        bounds = chunk.column("sample_offsets")
        for sample, length in enumerate(np.diff(bounds).tolist()):
            middle = int(draw.integers(0, length + 1))
            for first, last in ((0, middle), (middle, length)):
                if first < last:
                    kind = chunk.column("kind")[bounds[sample] + first : bounds[sample] + last]
                    loss = int((kind[1:] != int(Kind.USER)).sum())
                    rows.append((index, sample, sample, first, last - first, length, loss, False))
    sequences = np.zeros(len(rows), SEQUENCE)
    for row, values in zip(sequences, rows, strict=True):
        (row["chunk"], row["sample"], row["row"], row["first"], row["length"]) = values[:5]
        (row["full_length"], row["loss_tokens"], row["terminated"]) = values[5:]
    return sequences


@given(
    chunks=st.lists(st.lists(st.integers(1, 6), max_size=5), min_size=1, max_size=3),
    shard_tokens=st.integers(1, 40),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=60)
def test_shards_hold_the_tokens_of_their_sequences_in_pack_order(
    chunks: list[list[int]], shard_tokens: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        store = SampleStore(
            Path(folder),
            tuple(
                write_chunk(Path(folder) / f"chunk-{index:05d}", lengths, draw)
                for index, lengths in enumerate(chunks)
            ),
        )
        sequences = draw.permutation(sequences_of(store, draw))
        source_of = draw.integers(0, 2, len(sequences))
        inner = draw.choice(len(sequences) + 1, min(3, len(sequences)), replace=False)
        pack_offsets = np.unique([0, len(sequences), *inner]).astype(np.int64)
        if not len(sequences):
            return
        written = assemble(
            Path(folder), stores=[store, store], sequences=sequences, source_of=source_of,
            pack_offsets=pack_offsets, policy=MaskConfig(), is_added=np.ones(50, np.bool_),
            shard_tokens=shard_tokens, on_sequences=lambda count: None,
        )  # fmt: skip
        shards: list[Columns] = [
            {name: np.load(Path(folder) / shard.path / f"{name}.npy") for name in SHARD_COLUMNS}
            for shard in written.shards
        ]
        expected = []
        for sequence, source in zip(sequences, source_of, strict=True):
            chunk = store.chunks[sequence["chunk"]]
            start = chunk.column("sample_offsets")[sequence["sample"]] + sequence["first"]
            part = slice(start, start + sequence["length"])
            tokens, kind = chunk.column("tokens")[part], chunk.column("kind")[part]
            mask = (kind != int(Kind.USER)).astype(np.uint8)
            mask[0] = 0
            origin = [source, sequence["row"], sequence["first"]]
            expected.append((tokens.tolist(), kind.tolist(), mask.tolist(), origin))
    copied = []
    for shard in shards:
        bounds = shard["seq_offsets"]
        assert len(shard["pack_offsets"]) == 2 or bounds[-1] <= shard_tokens
        for index, (start, end) in enumerate(pairwise(bounds)):
            names = ("tokens", "kind", "loss_mask")
            values = [shard[name][start:end].tolist() for name in names]
            copied.append((*values, shard["seq_origin"][index].tolist()))
    assert copied == expected
    packs = np.concatenate([np.diff(shard["pack_offsets"]) for shard in shards])
    assert packs.tolist() == np.diff(pack_offsets).tolist()
    losses = np.concatenate([shard["pack_loss_tokens"] for shard in shards])
    assert losses.sum() == sum(sum(mask) for _, _, mask, _ in expected) == written.loss_tokens.sum()
    assert written.max_token_id == max(max(tokens) for tokens, *_ in expected)
    counts = [count_terminators(shard, np.ones(50, np.bool_)) for shard in shards]
    assert written.terminators == sum(counts, start=Counter())


@given(data=st.data(), block=st.integers(1, 8))
@settings(deadline=None, max_examples=200)
def test_the_last_token_of_a_trained_run_of_terminators_counts_whatever_the_blocks(
    data: st.DataObject, block: int
) -> None:
    kinds = [int(Kind.USER), int(Kind.ASSISTANT), int(Kind.TERMINATOR)]
    token = st.tuples(st.integers(0, 3), st.sampled_from(kinds), st.integers(0, 1))
    rows = data.draw(st.lists(token, max_size=30))
    tokens, kind, mask = (np.asarray([row[i] for row in rows], np.int32) for i in range(3))
    is_added = np.asarray([True, False, True, True])
    ends = [kind & KIND_MASK == Kind.TERMINATOR and bool(on) for _, kind, on in rows] + [False]
    expected: dict[int, int] = {}
    for index, (token_id, _, _) in enumerate(rows):
        if ends[index] and not ends[index + 1] and is_added[token_id]:
            expected[token_id] = expected.get(token_id, 0) + 1
    written = {"tokens": tokens, "kind": kind.astype(np.uint8), "loss_mask": mask.astype(np.uint8)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_BLOCK_TOKENS", block)
        assert count_terminators(written, is_added) == expected
