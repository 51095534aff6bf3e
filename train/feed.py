"""The micro-batches of this rank, step after step, prepared by one thread while the device works on the step before."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from shared.shard_reader import ShardSet
from train.batch import MicroBatch, check_pack, make_micro_batch
from train.loss import Norm, sample_weights, uniform_weight
from train.plan import Ids, PackOrder, split_step


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one step needs of this rank, and the counts of the whole step, the same on every rank."""

    step: int
    pack_ids: Ids
    micro_batches: list[MicroBatch]
    num_tokens: int
    num_positions: int
    """Tokens and the fillers of ranks without a pack."""
    num_loss_tokens: int
    squared_lengths: int
    """Sum over sequences of their length squared: what causal attention costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """Makes the batches of one rank. Needs no message from other ranks: all counts come from the shard set."""

    shard_set: ShardSet
    order: PackOrder
    norm: Norm
    rank: int
    world_size: int
    packs_per_micro_batch: int

    def steps(self, start: int) -> Iterator[StepBatch]:
        """Yield the batches of the steps from `start` to the end of the run, one prepared ahead."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as pool:
            ahead = pool.submit(self.make, start) if start < self.order.total_steps else None
            for step in range(start, self.order.total_steps):
                assert ahead is not None
                batch = ahead.result()
                ahead = pool.submit(self.make, step + 1) if step + 1 < self.order.total_steps else None
                yield batch

    def make(self, step: int) -> StepBatch:
        """Return the batch of step `step`."""
        pack_ids = self.order.step(step)
        lengths = [self.shard_set.seq_lengths(int(pack_id)) for pack_id in pack_ids]
        costs = np.array([np.dot(length, length) for length in lengths], np.int64)
        ranks = split_step(
            pack_ids, costs, world_size=self.world_size, packs_per_micro_batch=self.packs_per_micro_batch
        )
        num_loss_tokens = int(self.shard_set.loss_tokens(pack_ids).sum())
        weight = uniform_weight(self.norm, num_loss_tokens)
        weights = self._weights(pack_ids, weight)
        num_tokens = int(sum(length.sum() for length in lengths))
        return StepBatch(
            step=step,
            pack_ids=pack_ids,
            micro_batches=[self._micro_batch(ids, weights, weight) for ids in ranks[self.rank]],
            num_tokens=num_tokens,
            num_positions=num_tokens + sum(len(ids) == 0 for rank in ranks for ids in rank),
            num_loss_tokens=num_loss_tokens,
            squared_lengths=int(costs.sum()),
        )

    def _weights(
        self, pack_ids: Ids, weight: float | None
    ) -> dict[int, "np.ndarray[tuple[int], np.dtype[np.float32]]"]:
        """Weights of each pack's loss tokens; of all packs where they depend on the whole step, else none yet."""
        if weight is not None:
            return {}
        packs = [self.shard_set.pack(int(pack_id)) for pack_id in pack_ids]
        return dict(zip(pack_ids.tolist(), sample_weights(packs), strict=True))

    def _micro_batch(
        self,
        pack_ids: Ids,
        weights: dict[int, "np.ndarray[tuple[int], np.dtype[np.float32]]"],
        weight: float | None,
    ) -> MicroBatch:
        packs = [self.shard_set.pack(int(pack_id)) for pack_id in pack_ids]
        counts = self.shard_set.loss_tokens(pack_ids)
        for pack, pack_id, count in zip(packs, pack_ids.tolist(), counts.tolist(), strict=True):
            check_pack(
                pack,
                pack_id,
                num_loss_tokens=count,
                max_token_id=self.shard_set.manifest.max_token_id,
                where=str(self.shard_set.path),
            )
        chosen = [
            weights[pack_id] if weight is None else np.full(count, weight, np.float32)
            for pack_id, count in zip(pack_ids.tolist(), counts.tolist(), strict=True)
        ]
        return make_micro_batch(packs, chosen, uniform_weight=weight)
