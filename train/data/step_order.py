"""Which packs, or which conversations, make up which step: pure numpy, a function of its arguments.

The order of a run is one permutation of all units for each epoch, one after the other. A step takes
the next `units_per_step` of it, so it may span two epochs; only the last step may be short. Nothing
here depends on the number of ranks; train/data/balance.py divides the step among them.

    epoch      0 . . . . . . | 1 . . . . . . | 2 ...
    order      4 0 3 5 1 2   | 2 5 0 1 4 3   | ...      unit ids
    step       0 0 0 0 1 1     1 1 2 2 2 2     ...      units_per_step = 4
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError
from shared.hashing import seed_from
from shared.splitmix import finalize
from train.config import BatchConfig

Ids = npt.NDArray[np.int64]

Unit = Literal["pack", "conversation"]
"""What is shuffled and counted: a pack of the shard set, or one of its sequences, which is then a
whole conversation."""

_ROUNDS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOrder:
    """The order of packs or conversations over a whole run."""

    unit: Unit
    fingerprint: str
    seed: int
    num_units: int
    """Packs, or sequences, of the shard set."""
    units_per_step: int
    total_steps: int
    total_units: int
    """Units of all steps together; the last step holds the remainder."""

    def step(self, step: int) -> Ids:
        """Return the unit ids of step `step`, counted from 0, in order. Every step costs the
        same."""
        assert 0 <= step < self.total_steps, (step, self.total_steps)
        start = step * self.units_per_step
        positions = np.arange(
            start, min(start + self.units_per_step, self.total_units), dtype=np.int64
        )
        epochs, index = np.divmod(positions, self.num_units)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            key = seed_from(f"{self.unit} order", self.fingerprint, self.seed, int(epoch))
            ids[epochs == epoch] = permute(index[epochs == epoch], self.num_units, key)
        return ids

    def epoch_after(self, steps: int) -> float:
        """Return how many epochs `steps` steps make."""
        return min(steps * self.units_per_step, self.total_units) / self.num_units


def make_order(
    *,
    unit: Unit,
    fingerprint: str,
    seed: int,
    num_units: int,
    units_per_step: int,
    epochs: float,
    max_steps: int | None,
) -> StepOrder:
    """Return the order of a run of `max_steps` steps, or of `epochs` epochs if that is None."""
    total_units = math.ceil(epochs * num_units) if max_steps is None else max_steps * units_per_step
    return StepOrder(
        unit=unit,
        fingerprint=fingerprint,
        seed=seed,
        num_units=num_units,
        units_per_step=units_per_step,
        total_steps=math.ceil(total_units / units_per_step),
        total_units=total_units,
    )


def permute(index: Ids, size: int, key: int) -> Ids:
    """Return the images of `index` under the permutation of range(size) that `key` selects.

    There is no table, so memory and start-up do not grow with the number of packs, and no library's
    shuffle, which may change with its version.
    """
    # A Feistel network permutes the next power of four. An image outside range(size) is permuted
    # again until it falls inside, which takes at most four passes on average.
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    keys = [np.uint64(seed_from("round", key, number)) for number in range(_ROUNDS)]
    values = index.astype(np.uint64)
    pending = np.ones(len(values), bool)
    while pending.any():
        left, right = values[pending] >> np.uint64(half_bits), values[pending] & mask
        for round_key in keys:
            left, right = right, left ^ (finalize(right ^ round_key) & mask)
        values[pending] = left << np.uint64(half_bits) | right
        pending = values >= size
    return values.astype(np.int64)


def units_per_step(batch: BatchConfig, *, max_seq_len: int) -> tuple[Unit, int]:
    """Return the unit of a step and the number of them. Raises ConfigError if tokens_per_step is
    not a number of whole packs."""
    if batch.conversations_per_step is not None:
        return "conversation", batch.conversations_per_step
    if batch.packs_per_step is not None:
        return "pack", batch.packs_per_step
    tokens = batch.tokens_per_step
    assert tokens is not None
    if tokens % max_seq_len:
        below = tokens // max_seq_len * max_seq_len
        near = " or ".join(str(value) for value in (below, below + max_seq_len) if value)
        raise ConfigError(
            f"batch.tokens_per_step = {tokens} is not a multiple of the shards' max_seq_len"
            f" {max_seq_len}; use {near}"
        )
    return "pack", tokens // max_seq_len


def check_divides(*, packs_per_step: int, packs_per_micro_batch: int, world_size: int) -> None:
    """Raise ConfigError unless every rank gets the same whole number of micro-batches; the message
    lists sizes that work."""
    unit = world_size * packs_per_micro_batch
    if packs_per_step % unit == 0:
        return
    below = packs_per_step // unit * unit
    steps = " or ".join(str(value) for value in (below, below + unit) if value)
    ranks = [
        n for n in range(1, packs_per_step + 1) if packs_per_step % (n * packs_per_micro_batch) == 0
    ]
    # A smaller micro-batch that divides what each rank gets, if the ranks divide the packs.
    fewer = (
        math.gcd(packs_per_micro_batch, packs_per_step // world_size)
        if packs_per_step % world_size == 0
        else 0
    )
    smaller = f"set batch.packs_per_micro_batch = {fewer}, which changes no gradient, or "
    raise ConfigError(
        f"{packs_per_step} packs per step do not divide over {world_size} ranks x"
        f" {packs_per_micro_batch} packs per micro-batch (batch.packs_per_micro_batch);"
        f" {smaller if fewer else ''}use {steps} packs per step"
        + (f", or {', '.join(map(str, ranks))} ranks" if ranks else "")
    )
