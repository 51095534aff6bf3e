"""Packed sequences -> the column files of shards: tokens are copied from the sample stores in pack
order.

Shards take packs in order; a shard is closed before it would exceed `shard_tokens`. A pack never
spans two shards.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.config import MaskConfig
from prep.selection.loss_mask import loss_mask_of
from prep.store.sample_store import SampleStore
from shared.shard_format import KIND_MASK, Kind, ShardEntry
from shared.shard_writer import write_shard

Ints = npt.NDArray[np.int64]

SHARD_TOKENS = 1 << 27  # 512 MiB of int32
_BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True, slots=True)
class WrittenColumns:
    shards: list[ShardEntry]
    terminators: dict[int, int]  # id of an added token -> how often it ends a trained turn
    max_token_id: int
    loss_tokens: Ints  # by source


def assemble(
    out: Path,
    *,
    stores: Sequence[SampleStore],
    sequences: npt.NDArray[np.void],  # SEQUENCE [S] of all sources, in pack order
    source_of: Ints,  # [S]
    pack_offsets: Ints,  # [P+1] in sequences
    policy: MaskConfig,
    is_added: npt.NDArray[np.bool_],  # [vocab_size] added tokens, control tokens included
    shard_tokens: int = SHARD_TOKENS,
    on_sequences: Callable[[int], None],
) -> WrittenColumns:
    """Write all shards below `out`; `on_sequences` is called with numbers of copied sequences."""
    # the groups of a split source share one store: the first index of each store stands for it
    first = {store.path: index for index, store in reversed(list(enumerate(stores)))}
    store_of = np.asarray([first[store.path] for store in stores], np.int64)  # by source
    ends = np.concatenate(([0], np.cumsum(sequences["length"], dtype=np.int64)))  # [S+1]
    shards: list[ShardEntry] = []
    counts = Counter[int]()
    max_token_id = 0
    loss_tokens = np.zeros(len(stores), np.int64)
    first_pack = 0
    while first_pack < len(pack_offsets) - 1:
        begin = pack_offsets[first_pack]
        limit = ends[begin] + shard_tokens
        last_pack = int(np.searchsorted(ends[pack_offsets], limit, side="right")) - 1
        last_pack = max(last_pack, first_pack + 1)  # a pack larger than a shard is one on its own
        shard = slice(begin, pack_offsets[last_pack])
        columns = _copy_sequences(
            stores, store_of, sequences[shard], source_of[shard], policy, on_sequences
        )
        columns["pack_offsets"] = pack_offsets[first_pack : last_pack + 1] - begin
        per_sequence = sequences["loss_tokens"][shard].astype(np.int64)
        columns["pack_loss_tokens"] = np.add.reduceat(
            per_sequence, columns["pack_offsets"][:-1]
        ).astype(np.int32)
        np.add.at(loss_tokens, source_of[shard], per_sequence)
        shards.append(write_shard(out, len(shards), columns))
        max_token_id = max(max_token_id, int(columns["tokens"].max()))
        counts.update(count_terminators(columns, is_added))
        first_pack = last_pack
    return WrittenColumns(shards, counts, max_token_id, loss_tokens)


def _copy_sequences(
    stores: Sequence[SampleStore],
    store_of: Ints,  # by source
    sequences: npt.NDArray[np.void],  # [S]
    source_of: Ints,  # [S]
    policy: MaskConfig,
    on_sequences: Callable[[int], None],
) -> dict[str, npt.NDArray[Any]]:
    """Copy the sequences of one shard into new columns, which are in pack order.

    The copies are made chunk by chunk: each chunk is mapped and masked once per shard, though its
    sequences lie anywhere in the shard.
    """
    offsets = np.concatenate(([0], np.cumsum(sequences["length"], dtype=np.int64)))
    tokens = np.empty(offsets[-1], np.int32)
    kind = np.empty(offsets[-1], np.uint8)
    mask = np.empty(offsets[-1], np.uint8)
    stored_in = store_of[source_of]
    order = np.lexsort((sequences["sample"], sequences["chunk"], stored_in))
    key = stored_in[order] * (1 << 32) + sequences["chunk"][order]
    bounds = np.flatnonzero(np.diff(key, prepend=-1, append=-1))
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        members = order[first:last]
        chunk = stores[stored_in[members[0]]].chunks[sequences["chunk"][members[0]]]
        samples = chunk.samples()
        chunk_tokens, chunk_kind = chunk.column("tokens"), samples.kind
        chunk_mask = loss_mask_of(samples, policy)
        starts = samples.sample_offsets[sequences["sample"][members]] + sequences["first"][members]
        for start, length, at in zip(
            starts.tolist(),
            sequences["length"][members].tolist(),
            offsets[members].tolist(),
            strict=True,
        ):
            tokens[at : at + length] = chunk_tokens[start : start + length]
            kind[at : at + length] = chunk_kind[start : start + length]
            mask[at : at + length] = chunk_mask[start : start + length]
        on_sequences(len(members))
    # The first token of a sequence is never trained: nothing predicts it. This holds for the later
    # fragments of a split row too, whose previous token is in another sequence.
    mask[offsets[:-1]] = 0
    origin = np.zeros((len(sequences), 3), np.int64)
    origin[:, 0] = source_of
    origin[:, 1] = sequences["row"]
    origin[:, 2] = sequences["first"]
    return {
        "tokens": tokens,
        "kind": kind,
        "loss_mask": mask,
        "seq_offsets": offsets,
        "seq_origin": origin,
    }


def count_terminators(
    columns: Mapping[str, npt.NDArray[Any]], is_added: npt.NDArray[np.bool_]
) -> Counter[int]:
    """Count the added tokens that end trained turns; block by block, to save memory."""
    counts = Counter[int]()
    for start in range(0, len(columns["tokens"]), _BLOCK_TOKENS):
        # one token more, because only the last one of a run of terminators counts
        block = slice(start, start + _BLOCK_TOKENS + 1)
        kind, mask, tokens = (columns[name][block] for name in ("kind", "loss_mask", "tokens"))
        ends = np.append(((kind & KIND_MASK) == Kind.TERMINATOR) & (mask == 1), False)
        last = (ends[:-1] & ~ends[1:])[:_BLOCK_TOKENS]
        terminators = tokens[:_BLOCK_TOKENS][last]
        counts.update(terminators[is_added[terminators]].tolist())
    return counts
