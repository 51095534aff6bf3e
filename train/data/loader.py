"""The micro-batches of this rank, step after step, prepared by one thread while the device works on
the step before."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    """What one step needs of this rank, and the counts of the whole step, the same on every
    rank."""

    step: int
    unit: Unit
    ids: Ids
    """The packs, or the sequences, of the step over all ranks."""
    micro_batches: list[MicroBatch]
    num_tokens: int
    num_positions: int
    """Tokens and the fillers of ranks without a micro-batch."""
    num_loss_tokens: int
    squared_lengths: int
    """Sum over sequences of their length squared: what causal attention costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoader:
    """Makes the batches of one rank. Needs no message from other ranks: all counts come from the
    shard set."""

    shard_set: ShardSet
    order: StepOrder
    loss: LossConfig
    rank: int
    world_size: int
    packs_per_micro_batch: int
    sequence_parallel: int = 1
    """Neighbouring ranks that share their rows; each takes a slice of every micro-batch."""

    def steps(self, start: int) -> Iterator[StepBatch]:
        """Yield the batches of the steps from `start` to the end of the run, one prepared ahead."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as pool:
            ahead = pool.submit(self.make, start) if start < self.order.total_steps else None
            for step in range(start, self.order.total_steps):
                assert ahead is not None
                batch = ahead.result()
                ahead = (
                    pool.submit(self.make, step + 1) if step + 1 < self.order.total_steps else None
                )
                yield batch

    def plan(self, step: int) -> StepPlan:
        """Return what step `step` holds and which rank runs it."""
        return plan_step(
            self.shard_set,
            self.order,
            step,
            world_size=self.world_size // self.sequence_parallel,
            packs_per_micro_batch=self.packs_per_micro_batch,
        )

    def make(self, step: int) -> StepBatch:
        """Return the batch of step `step`.

        Raises ArtifactError for a shard that was changed under the run, ChecksumError for a pack or
        conversation that is damaged.
        """
        shards = self.shard_set.shards_of(self.order.step(step), self.order.unit)
        self.shard_set.check_unchanged(shards)
        plan = self.plan(step)
        counts = self._loss_tokens(plan)
        num_loss_tokens = int(counts.sum())
        weight = uniform_weight(self.loss, num_loss_tokens)
        weights = sample_weights(plan.packs) if weight is None else None
        num_tokens = int(sum(length.sum() for length in plan.lengths))
        group, slice_index = divmod(self.rank, self.sequence_parallel)
        return StepBatch(
            step=step,
            unit=plan.unit,
            ids=plan.ids,
            micro_batches=[
                take_slice(batch, slice_index, self.sequence_parallel)
                for batch in (
                    self._micro_batch(
                        plan, positions, counts, weights, weight, num_tokens=num_tokens
                    )
                    for positions in plan.ranks[group]
                )
            ],
            num_tokens=num_tokens,
            num_positions=self._num_positions(plan),
            num_loss_tokens=num_loss_tokens,
            squared_lengths=int(sum(np.dot(length, length) for length in plan.lengths)),
        )

    def _num_positions(self, plan: StepPlan) -> int:
        """Tokens, one filler for each empty micro-batch, and what makes rows divide over the ranks
        that share them."""
        tokens = [
            sum(int(plan.lengths[i].sum()) for i in positions)
            for rank in plan.ranks
            for positions in rank
        ]
        return sum(
            -(-max(1, count) // self.sequence_parallel) * self.sequence_parallel for count in tokens
        )

    def _loss_tokens(self, plan: StepPlan) -> npt.NDArray[np.int64]:
        """Loss tokens of each unit, int64 [n]: stored for packs, counted for conversations."""
        if plan.unit == "pack":
            return self.shard_set.loss_tokens(plan.ids)
        return np.array([np.count_nonzero(pack.loss_mask) for pack in plan.packs], np.int64)

    def _micro_batch(
        self,
        plan: StepPlan,
        positions: Positions,
        counts: npt.NDArray[np.int64],
        weights: list[npt.NDArray[np.float32]] | None,
        weight: float | None,
        *,
        num_tokens: int,
    ) -> MicroBatch:
        """`weights` are those of each unit's loss tokens, None where all have the same,
        `weight`."""
        chosen = positions.tolist()
        for position in chosen:
            self._check(plan, position)
        packs = [plan.packs[position] for position in chosen]
        if weights is None:
            own_weights = [np.full(counts[position], weight, np.float32) for position in chosen]
        else:
            own_weights = [weights[position] for position in chosen]
        batch = make_micro_batch(packs, own_weights, uniform_weight=weight)
        return replace(batch, token_share=sum(len(pack.tokens) for pack in packs) / num_tokens)

    def _check(self, plan: StepPlan, position: int) -> None:
        """A conversation is checked as part of its pack, whose loss tokens are stored."""
        pack_id = int(plan.ids[position])
        if plan.unit == "conversation":
            pack_id = self.shard_set.pack_of(pack_id)
        check_pack(
            self.shard_set.pack(pack_id),
            pack_id,
            num_loss_tokens=int(self.shard_set.loss_tokens(np.array([pack_id]))[0]),
            max_token_id=self.shard_set.manifest.max_token_id,
            where=str(self.shard_set.path),
        )
