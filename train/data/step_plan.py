"""What one step holds and who runs it, read from a shard set; numpy only, so commands without torch
can ask too."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError, DataError
from shared.shard_format import Manifest
from shared.shard_reader import Pack, ShardSet
from train.data.balance import Positions, assign_micro_batches, costs_of
from train.data.step_order import Ids, StepOrder, Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """A step and its division. n units: packs, or conversations."""

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
    """Return step `step`, counted from 0. Raises DataError for a fragment where whole conversations
    are asked for.

    A micro-batch holds `packs_per_micro_batch` packs, or as many conversations as fit in the tokens
    of so many packs.
    """
    ids = order.step(step)
    if order.unit == "pack":
        packs = [shard_set.pack(pack_id) for pack_id in ids.tolist()]
    else:
        packs = [shard_set.sequence(sequence_id) for sequence_id in ids.tolist()]
        _check_whole(packs, shard_set)
    lengths = [np.diff(pack.seq_offsets) for pack in packs]
    if order.unit == "pack":
        sizes, capacity = np.ones(len(ids), np.int64), packs_per_micro_batch
    else:
        sizes = np.array([length.sum() for length in lengths], np.int64)
        capacity = packs_per_micro_batch * shard_set.manifest.max_seq_len
    ranks = assign_micro_batches(sizes, costs_of(lengths), capacity=capacity, world_size=world_size)
    return StepPlan(unit=order.unit, ids=ids, packs=packs, lengths=lengths, ranks=ranks)


def origins(plan: StepPlan) -> list[npt.NDArray[np.int64]]:
    """Return, for each rank, the origins of the sequences that it runs, int64 [S, 3], in the order
    that it runs them.

    An origin is (source index, row number, first token within the sample), as in seq_origin.npy.
    """
    none = [np.empty((0, 3), np.int64)]
    return [
        np.concatenate(
            none + [plan.packs[position].seq_origin for positions in rank for position in positions]
        )
        for rank in plan.ranks
    ]


def check_conversations(manifest: Manifest) -> None:
    """Raise ConfigError if rows of the set were split, so that a step of whole conversations cannot
    be drawn."""
    split = {source.name: source.details.get("rows_split") for source in manifest.sources}
    for name, count in split.items():
        if count:
            raise ConfigError(
                f"batch.conversations_per_step needs whole conversations; {count} rows of source"
                f' {name!r} were split into fragments (lengths.over_length = "split"). Build the'
                " set with another over_length, or state the batch in packs_per_step or"
                " tokens_per_step"
            )


def _check_whole(packs: list[Pack], shard_set: ShardSet) -> None:
    for pack in packs:
        source, row, first = pack.seq_origin[0].tolist()
        if first:
            raise DataError(
                f"{shard_set.path}: source {source}, row {row} was split, a fragment of it begins"
                f" at token {first}; batch.conversations_per_step needs whole conversations: build"
                " the set with another over_length, or state the batch in packs_per_step or"
                " tokens_per_step"
            )
