"""How long a run is and what it costs: steps, tokens, FLOPs, hours, at an efficiency that somebody
states."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.shard_reader import ShardSet
from train.config import TrainConfig
from train.data.balance import assign_micro_batches, costs_of
from train.data.step_order import StepOrder
from train.estimate.data_size import DataSize
from train.sizing.flops import ModelCost

_SAMPLED_STEPS = 8  # of which the division over ranks is looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """How ranks share the steps."""

    micro_batches: int
    """Of a rank in a step, the most that were seen."""
    waiting: float
    """Work of the dearest rank over that of the mean one, at each micro-batch: what waiting
    multiplies time by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Of the whole run."""

    steps: int
    warmup_steps: int
    epochs: float
    tokens: int
    loss_tokens: int
    flops: float
    """Of forward and backward passes as in MFU: nothing that is computed twice counts twice."""
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
    """Return what a run takes at `flops_per_second` of all GPUs together, while none waits."""
    epochs = order.total_units / order.num_units
    totals = data.totals
    tokens, loss_tokens = round(totals.tokens * epochs), round(totals.loss_tokens * epochs)
    flops = cost.flops(
        tokens=tokens, loss_tokens=loss_tokens, squared_lengths=round(data.squared_lengths * epochs)
    )
    return Forecast(
        steps=order.total_steps,
        warmup_steps=math.ceil(recipe.schedule.warmup_ratio * order.total_steps),
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
    """Return how `world_size` ranks share the steps, from steps at equal distances over the run.

    Without a shard set packs are all alike, and lengths of conversations are drawn from the spread
    that is assumed.
    """
    per_micro_batch = recipe.batch.packs_per_micro_batch
    capacity = per_micro_batch * (1 if order.unit == "pack" else data.max_seq_len)
    highest, mean, micro_batches = 0.0, 0.0, 0
    full_steps = max(1, order.total_units // order.units_per_step)  # the last one may be short
    for step in (
        np.linspace(0, full_steps - 1, min(_SAMPLED_STEPS, full_steps)).astype(int).tolist()
    ):
        lengths = _lengths(order, data, shard_set, step)
        sizes = np.array(
            [1 if order.unit == "pack" else length.sum() for length in lengths], np.int64
        )
        costs = costs_of(lengths)
        ranks = assign_micro_batches(sizes, costs, capacity=capacity, world_size=world_size)
        loads = np.array(
            [[costs[positions].sum() for positions in rank] for rank in ranks]
        )  # [W, micro-batches]
        highest += float(loads.max(axis=0).sum())
        mean += float(loads.mean(axis=0).sum())
        micro_batches = max(micro_batches, loads.shape[1])
    return Division(micro_batches=micro_batches, waiting=highest / mean)


def _lengths(
    order: StepOrder, data: DataSize, shard_set: ShardSet | None, step: int
) -> list[npt.NDArray[np.int64]]:
    """Return the lengths of the sequences of each unit of a step."""
    ids = order.step(step)
    if shard_set is None:
        most = data.max_seq_len
        if order.unit == "pack":
            return [np.array([most], np.int64) for _ in ids]
        mean = data.totals.tokens / data.totals.sequences
        drawn = np.random.default_rng(step).exponential(mean, len(ids))
        return [np.array([length], np.int64) for length in np.clip(drawn, 1, most).astype(np.int64)]
    if order.unit == "pack":
        return [shard_set.seq_lengths(pack_id) for pack_id in ids.tolist()]
    return [np.diff(shard_set.sequence(sequence_id).seq_offsets) for sequence_id in ids.tolist()]
