"""How long a run is: steps, tokens, FLOPs and hours, at an MFU that the user gives."""

from dataclasses import dataclass

import numpy as np

from shared.shard_reader import ShardSet
from train.config import TrainConfig
from train.data.balance import assign_micro_batches, costs_of
from train.data.step_order import StepOrder
from train.estimate.data_size import DataSize
from train.loop.schedule import warmup_steps
from train.sizing.flops import ModelCost

# The number of steps whose division over ranks is computed.
_SAMPLED_STEPS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """How ranks share the steps."""

    micro_batches: int
    """Of a rank in a step: the most in any sampled step."""
    waiting: float
    """What waiting for the slowest rank multiplies time by: the work of the most loaded rank over
    the mean, at each micro-batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """The whole run."""

    steps: int
    warmup_steps: int
    epochs: float
    tokens: int
    loss_tokens: int
    flops: float
    """Of forward and backward passes as in MFU: what checkpointing computes again counts once."""
    seconds: float


def forecast(
    recipe: TrainConfig,
    order: StepOrder,
    data: DataSize,
    cost: ModelCost,
    *,
    flops_per_second: float,
    waiting: float,
) -> Forecast:
    """Return what a run takes if all GPUs together compute `flops_per_second` while none waits."""
    epochs = order.total_units / order.num_units
    totals = data.totals
    tokens, loss_tokens = round(totals.tokens * epochs), round(totals.loss_tokens * epochs)
    flops = cost.flops(
        tokens=tokens, loss_tokens=loss_tokens, squared_lengths=round(data.squared_lengths * epochs)
    )
    return Forecast(
        steps=order.total_steps,
        warmup_steps=warmup_steps(recipe.schedule, order.total_steps),
        epochs=epochs,
        tokens=tokens,
        loss_tokens=loss_tokens,
        flops=flops,
        seconds=flops / flops_per_second * waiting,
    )


def division(
    recipe: TrainConfig,
    order: StepOrder,
    data: DataSize,
    shard_set: ShardSet | None,
    *,
    world_size: int,
) -> Division:
    """Return how `world_size` ranks share the steps, from some steps spread evenly over the run.

    Without a shard set all packs are full, and the lengths of conversations are drawn from the
    distribution that size_from_flags assumes.
    """
    max_seq_len, totals = data.max_seq_len, data.totals
    of_packs = order.unit == "pack"
    capacity = recipe.batch.packs_per_micro_batch * (1 if of_packs else max_seq_len)
    # Sums over the sampled steps: of the most loaded rank, and of the mean rank.
    highest, mean, micro_batches = 0.0, 0.0, 0
    # The last step of the run may be short.
    full_steps = max(1, order.total_units // order.units_per_step)
    sampled = np.linspace(0, full_steps - 1, min(_SAMPLED_STEPS, full_steps)).astype(int)
    for step in sampled.tolist():
        ids = order.step(step).tolist()
        # For each unit of the step the lengths of its sequences, int64.
        if shard_set is not None and of_packs:
            lengths = [shard_set.seq_lengths(pack_id) for pack_id in ids]
        elif shard_set is not None:
            lengths = [np.diff(shard_set.sequence(number).seq_offsets) for number in ids]
        elif of_packs:
            lengths = [np.array([max_seq_len], np.int64)] * len(ids)
        else:
            drawn = np.random.default_rng(step).exponential(
                totals.tokens / totals.sequences, len(ids)
            )
            lengths = list(np.clip(drawn, 1, max_seq_len).astype(np.int64)[:, None])
        sizes = np.array([1 if of_packs else length.sum() for length in lengths], np.int64)
        costs = costs_of(lengths)
        ranks = assign_micro_batches(sizes, costs, capacity=capacity, world_size=world_size)
        # The cost of each micro-batch of each rank, [ranks, micro-batches]. Ranks wait for one
        # another after each micro-batch.
        loads = np.array([[costs[positions].sum() for positions in rank] for rank in ranks])
        highest += float(loads.max(axis=0).sum())
        mean += float(loads.mean(axis=0).sum())
        micro_batches = max(micro_batches, loads.shape[1])
    return Division(micro_batches=micro_batches, waiting=highest / mean)
