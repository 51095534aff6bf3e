"""The micro-batches of one rank, step after step; a thread prepares the next step while the device
works on this one."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shared.shard_reader import ShardSet
from train.config import LossConfig
from train.data.balance import Positions
from train.data.loss_weights import sample_weights, uniform_weight
from train.data.micro_batch import MicroBatch, check_pack, make_micro_batch
from train.data.sequence_slice import take_slice
from train.data.step_order import Ids, StepOrder, Unit
from train.data.step_plan import StepPlan, plan_step


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """The micro-batches of one rank in a step, and the counts of the whole step."""

    step: int
    unit: Unit
    ids: Ids
    """The packs, or sequences, of the step over all ranks."""
    micro_batches: list[MicroBatch]
    num_tokens: int
    num_positions: int
    """Tokens, and the fillers of rows that are empty or do not divide over the ranks that share
    them."""
    num_loss_tokens: int
    squared_lengths: int
    """Sum over sequences of their length squared: what causal attention costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoader:
    """Makes the batches of one rank. It needs no message from other ranks: all counts come from the
    shard set."""

    shard_set: ShardSet
    order: StepOrder
    loss: LossConfig
    rank: int
    world_size: int
    packs_per_micro_batch: int
    sequence_parallel: int = 1
    """Number of neighbouring ranks that share their rows; each takes a slice of every
    micro-batch."""

    def steps(self, start: int) -> Iterator[StepBatch]:
        """Yield the batches of the steps from `start` to the end of the run, one prepared ahead."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
            ahead: Future[StepBatch] | None = None
            for step in range(start, self.order.total_steps):
                batch = (ahead or pool.submit(self.make, step)).result()
                if step + 1 < self.order.total_steps:
                    ahead = pool.submit(self.make, step + 1)
                yield batch

    def plan(self, step: int) -> StepPlan:
        """Return what step `step` holds and which rank runs which part of it."""
        return plan_step(
            self.shard_set,
            self.order,
            step,
            world_size=self.world_size // self.sequence_parallel,
            packs_per_micro_batch=self.packs_per_micro_batch,
        )

    def make(self, step: int) -> StepBatch:
        """Return the batch of step `step`.

        Raises ArtifactError if a shard has changed since the run opened it, ChecksumError if a pack
        is damaged.
        """
        shards = self.shard_set.shards_of(self.order.step(step), self.order.unit)
        self.shard_set.check_unchanged(shards)
        plan = self.plan(step)
        tokens = np.array([lengths.sum() for lengths in plan.lengths], np.int64)  # [n]
        # The set stores the loss tokens of packs; those of conversations are counted.
        if plan.unit == "pack":
            loss_tokens = self.shard_set.loss_tokens(plan.ids)
        else:
            loss_tokens = np.array([np.count_nonzero(pack.loss_mask) for pack in plan.packs])
        num_loss_tokens = int(loss_tokens.sum())
        weight = uniform_weight(self.loss, num_loss_tokens)
        weights = sample_weights(plan.packs) if weight is None else None
        # An empty row holds one filler; rows that ranks share are filled up to divide over them.
        rows = [max(1, int(tokens[units].sum())) for rank in plan.ranks for units in rank]
        group, slice_index = divmod(self.rank, self.sequence_parallel)
        return StepBatch(
            step=step,
            unit=plan.unit,
            ids=plan.ids,
            micro_batches=[
                take_slice(batch, slice_index, self.sequence_parallel)
                for batch in (
                    self._micro_batch(
                        plan, units, tokens, loss_tokens, weights=weights, uniform=weight
                    )
                    for units in plan.ranks[group]
                )
            ],
            num_tokens=int(tokens.sum()),
            num_positions=sum(
                -(-row // self.sequence_parallel) * self.sequence_parallel for row in rows
            ),
            num_loss_tokens=num_loss_tokens,
            squared_lengths=int(sum(np.dot(lengths, lengths) for lengths in plan.lengths)),
        )

    def _micro_batch(
        self,
        plan: StepPlan,
        units: Positions,
        tokens: npt.NDArray[np.int64],
        loss_tokens: npt.NDArray[np.int64],
        *,
        weights: list[npt.NDArray[np.float32]] | None,
        uniform: float | None,
    ) -> MicroBatch:
        """Check the packs of `units` and join them. `weights` holds those of each unit's loss
        tokens, or is None if all weigh `uniform`."""
        for unit in units:
            # A conversation is checked with its whole pack: the set stores loss tokens by pack.
            pack_id = int(plan.ids[unit])
            if plan.unit == "conversation":
                pack_id = self.shard_set.pack_of(pack_id)
            check_pack(
                self.shard_set.pack(pack_id),
                pack_id,
                num_loss_tokens=int(self.shard_set.loss_tokens(np.array([pack_id]))[0]),
                max_token_id=self.shard_set.manifest.max_token_id,
                where=str(self.shard_set.path),
            )
        if weights is None:
            unit_weights = [np.full(loss_tokens[unit], uniform, np.float32) for unit in units]
        else:
            unit_weights = [weights[unit] for unit in units]
        batch = make_micro_batch(
            [plan.packs[unit] for unit in units], unit_weights, uniform_weight=uniform
        )
        return replace(batch, token_share=int(tokens[units].sum()) / int(tokens.sum()))
