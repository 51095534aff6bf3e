"""Packed sequences -> the column files of shards: copy tokens out of the sample stores in pack
order.

Packs are dealt to shards in order, a shard closing before it would exceed `shard_tokens`; a pack
never crosses shards.
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
class Assembled:
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
    is_added: npt.NDArray[np.bool_],  # [vocab_size] added tokens, which control tokens are among
    shard_tokens: int = SHARD_TOKENS,
    on_sequences: Callable[[int], None],
) -> Assembled:
    """Write all shards below `out`; `on_sequences` is told how many sequences were copied."""
    source = _Columns(stores, policy)
    lengths = sequences["length"].astype(np.int64)
    ends = np.concatenate(([0], np.cumsum(lengths)))  # [S+1]
    shards: list[ShardEntry] = []
    counts = Counter[int]()
    max_token_id = 0
    loss_tokens = np.zeros(len(stores), np.int64)
    first_pack = 0
    while first_pack < len(pack_offsets) - 1:
        begin = pack_offsets[first_pack]
        limit = ends[begin] + shard_tokens
        last_pack = int(np.searchsorted(ends[pack_offsets], limit, side="right")) - 1
        last_pack = max(last_pack, first_pack + 1)
        part = slice(begin, pack_offsets[last_pack])
        columns = _gather(source, sequences[part], source_of[part], on_sequences)
        columns["pack_offsets"] = pack_offsets[first_pack : last_pack + 1] - begin
        per_sequence = sequences["loss_tokens"][part].astype(np.int64)
        columns["pack_loss_tokens"] = np.add.reduceat(
            per_sequence, columns["pack_offsets"][:-1]
        ).astype(np.int32)
        np.add.at(loss_tokens, source_of[part], per_sequence)
        shards.append(write_shard(out, len(shards), columns))
        max_token_id = max(max_token_id, int(columns["tokens"].max()))
        counts.update(count_terminators(columns, is_added))
        first_pack = last_pack
    return Assembled(shards, counts, max_token_id, loss_tokens)


class _Columns:
    """Maps the columns of one chunk at a time of need; masks are computed once per chunk."""

    def __init__(self, stores: Sequence[SampleStore], policy: MaskConfig) -> None:
        self._stores = stores
        self._policy = policy
        first = {store.path: index for index, store in reversed(list(enumerate(stores)))}
        self.store_of = np.asarray(
            [first[store.path] for store in stores], np.int64
        )  # by source: parts share theirs

    def of(self, store: int, chunk: int) -> tuple[npt.NDArray[Any], ...]:
        """Return (tokens, kind, loss_mask, sample_offsets) of a chunk."""
        stored = self._stores[store].chunks[chunk]
        samples = stored.samples()
        return (
            stored.column("tokens"),
            samples.kind,
            loss_mask_of(samples, self._policy),
            samples.sample_offsets,
        )


def _gather(
    columns: _Columns,
    sequences: npt.NDArray[np.void],
    source_of: Ints,
    on_sequences: Callable[[int], None],
) -> dict[str, npt.NDArray[Any]]:
    """Copy sequences into new columns, chunk by chunk: each chunk is mapped and masked once per
    shard."""
    offsets = np.concatenate(([0], np.cumsum(sequences["length"], dtype=np.int64)))
    tokens = np.empty(offsets[-1], np.int32)
    kind = np.empty(offsets[-1], np.uint8)
    mask = np.empty(offsets[-1], np.uint8)
    store_of = columns.store_of[source_of]
    order = np.lexsort((sequences["sample"], sequences["chunk"], store_of))
    key = store_of[order] * (1 << 32) + sequences["chunk"][order]
    bounds = np.flatnonzero(np.diff(key, prepend=-1, append=-1))
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        members = order[first:last]
        from_tokens, from_kind, from_mask, from_offsets = columns.of(
            int(store_of[members[0]]), int(sequences["chunk"][members[0]])
        )
        starts = from_offsets[sequences["sample"][members]] + sequences["first"][members]
        for start, length, at in zip(
            starts.tolist(),
            sequences["length"][members].tolist(),
            offsets[members].tolist(),
            strict=True,
        ):
            tokens[at : at + length] = from_tokens[start : start + length]
            kind[at : at + length] = from_kind[start : start + length]
            mask[at : at + length] = from_mask[start : start + length]
        on_sequences(len(members))
    mask[offsets[:-1]] = 0  # of a later fragment too: what comes before it is not in the sequence
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
    """Count the added tokens that trained turns end with; in blocks, for the sake of memory."""
    counts = Counter[int]()
    for start in range(0, len(columns["tokens"]), _BLOCK_TOKENS):
        around = slice(
            start, start + _BLOCK_TOKENS + 1
        )  # one token more, to see whether a run goes on
        kind, mask, tokens = (columns[name][around] for name in ("kind", "loss_mask", "tokens"))
        ends = np.append(((kind & KIND_MASK) == Kind.TERMINATOR) & (mask == 1), False)
        last = (ends[:-1] & ~ends[1:])[:_BLOCK_TOKENS]
        found = tokens[:_BLOCK_TOKENS][last]
        counts.update(found[is_added[found]].tolist())
    return counts
