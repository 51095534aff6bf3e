"""What one step holds and which rank runs it, read from a shard set. Numpy only: commands that do
not load torch use it too."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError, DataError
from shared.shard_format import Manifest
from shared.shard_reader import Pack, ShardSet
from train.data.balance import Positions, assign_micro_batches, costs_of
from train.data.step_order import Ids, StepOrder, Unit

_WHOLE_ONLY = (
    "batch.conversations_per_step needs whole conversations: build the set with another"
    " over_length, or state the batch in packs_per_step or tokens_per_step"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """A step of n units (packs or conversations) and its division over the ranks."""

    unit: Unit
    ids: Ids
    """Packs or sequences of the shard set, int64 [n], in the order of the run: the same for any
    number of ranks."""
    packs: list[Pack]
    """The columns of each unit; a conversation is a pack of one sequence."""
    lengths: list[npt.NDArray[np.int64]]
    """The lengths of the sequences of each unit."""
    ranks: list[list[Positions]]
    """[world_size][num_micro_batches], positions in `ids`."""


def plan_step(
    shard_set: ShardSet, order: StepOrder, step: int, *, world_size: int, packs_per_micro_batch: int
) -> StepPlan:
    """Return step `step`, counted from 0.

    A micro-batch holds `packs_per_micro_batch` packs, or as many conversations as fit into that
    many packs. Raises DataError if a step of conversations would hold a fragment of one.
    """
    ids = order.step(step)
    # Packs are nearly full, so each counts as one; conversations count by their tokens.
    sizes, capacity = np.ones(len(ids), np.int64), packs_per_micro_batch
    if order.unit == "pack":
        packs = [shard_set.pack(pack_id) for pack_id in ids.tolist()]
    else:
        packs = [shard_set.sequence(sequence_id) for sequence_id in ids.tolist()]
        for pack in packs:
            source, row, first = pack.seq_origin[0].tolist()
            if first:
                raise DataError(
                    f"{shard_set.path}: source {source}, row {row} was split, a fragment of it"
                    f" begins at token {first}; {_WHOLE_ONLY}"
                )
        sizes = np.array([len(pack.tokens) for pack in packs], np.int64)
        capacity = packs_per_micro_batch * shard_set.manifest.max_seq_len
    lengths = [np.diff(pack.seq_offsets) for pack in packs]
    ranks = assign_micro_batches(sizes, costs_of(lengths), capacity=capacity, world_size=world_size)
    return StepPlan(unit=order.unit, ids=ids, packs=packs, lengths=lengths, ranks=ranks)


def origins(plan: StepPlan) -> list[npt.NDArray[np.int64]]:
    """Return, for each rank, the origins of the sequences that it runs, int64 [S, 3], in the order
    in which it runs them.

    An origin is (source index, row number, first token within the sample), as in seq_origin.npy.
    """
    # A rank may have no sequence, and concatenate needs one array.
    none = [np.empty((0, 3), np.int64)]
    return [
        np.concatenate(
            none + [plan.packs[position].seq_origin for positions in rank for position in positions]
        )
        for rank in plan.ranks
    ]


def check_conversations(manifest: Manifest) -> None:
    """Raise ConfigError if the build split rows, so that a step cannot hold whole conversations."""
    for source in manifest.sources:
        if count := source.details.get("rows_split"):
            raise ConfigError(
                f"{count} rows of source {source.name!r} were split into fragments"
                f' (lengths.over_length = "split"); {_WHOLE_ONLY}'
            )
