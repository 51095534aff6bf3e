"""Which packs make up which step, and which rank runs them: pure numpy, a function of its arguments alone.

The run's pack order is one permutation of all packs per epoch, one after the other; step k takes the next
`packs_per_step` of it, so a step may span two epochs and only the last one may be short. Nothing here depends on the
number of ranks but `split_step`, which divides the packs of a step that is already fixed.

    epoch      0 . . . . . . | 1 . . . . . . | 2 ...
    order      4 0 3 5 1 2   | 2 5 0 1 4 3   | ...      pack ids
    step       0 0 0 0 1 1     1 1 2 2 2 2     ...      packs_per_step = 4
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError
from shared.hashing import seed_from

Ids = npt.NDArray[np.int64]

_ROUNDS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PackOrder:
    """The order of packs over a whole run."""

    fingerprint: str
    seed: int
    num_packs: int
    packs_per_step: int
    total_steps: int
    total_packs: int
    """Packs of all steps together; the last step holds what is left of it."""

    def step(self, step: int) -> Ids:
        """Return the pack ids of step `step`, counted from 0, in order. Costs the same for every step."""
        assert 0 <= step < self.total_steps, (step, self.total_steps)
        start = step * self.packs_per_step
        positions = np.arange(start, min(start + self.packs_per_step, self.total_packs), dtype=np.int64)
        epochs, index = np.divmod(positions, self.num_packs)
        pack_ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            key = seed_from("pack order", self.fingerprint, self.seed, int(epoch))
            pack_ids[epochs == epoch] = permute(index[epochs == epoch], self.num_packs, key)
        return pack_ids

    def epoch_after(self, steps: int) -> float:
        """Return how many epochs lie behind after `steps` steps."""
        return min(steps * self.packs_per_step, self.total_packs) / self.num_packs


def make_order(
    *, fingerprint: str, seed: int, num_packs: int, packs_per_step: int, epochs: float, max_steps: int | None
) -> PackOrder:
    """Return the order of a run of `max_steps` steps, or of `epochs` epochs where that is None."""
    total_packs = math.ceil(epochs * num_packs) if max_steps is None else max_steps * packs_per_step
    return PackOrder(
        fingerprint=fingerprint,
        seed=seed,
        num_packs=num_packs,
        packs_per_step=packs_per_step,
        total_steps=math.ceil(total_packs / packs_per_step),
        total_packs=total_packs,
    )


def permute(index: Ids, size: int, key: int) -> Ids:
    """Return the images of `index` under the permutation of range(size) that `key` names.

    A Feistel network over the next even power of two, walked until the result falls below `size`: no table, so memory
    and start-up do not grow with the number of packs, and no library's shuffle, which may change with its version.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    keys = [np.uint64(seed_from("round", key, number)) for number in range(_ROUNDS)]
    values = index.astype(np.uint64)
    pending = np.ones(len(values), bool)
    while pending.any():
        left, right = values[pending] >> np.uint64(half_bits), values[pending] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[pending] = left << np.uint64(half_bits) | right
        pending = values >= size
    return values.astype(np.int64)


def packs_per_step(*, packs: int | None, tokens: int | None, max_seq_len: int) -> int:
    """Return the packs of one step from the two ways of stating them. Raises ConfigError for a part of a pack."""
    if packs is not None:
        return packs
    assert tokens is not None
    if tokens % max_seq_len:
        below = tokens // max_seq_len * max_seq_len
        near = " or ".join(str(value) for value in (below, below + max_seq_len) if value)
        raise ConfigError(
            f"batch.tokens_per_step = {tokens} is not a multiple of the shards' max_seq_len {max_seq_len}; use {near}"
        )
    return tokens // max_seq_len


def check_divides(*, packs_per_step: int, packs_per_micro_batch: int, world_size: int) -> None:
    """Raise ConfigError, naming what divides, unless each rank gets the same whole number of micro-batches."""
    unit = world_size * packs_per_micro_batch
    if packs_per_step % unit == 0:
        return
    below = packs_per_step // unit * unit
    steps = " or ".join(str(value) for value in (below, below + unit) if value)
    ranks = [n for n in range(1, packs_per_step + 1) if packs_per_step % (n * packs_per_micro_batch) == 0]
    raise ConfigError(
        f"{packs_per_step} packs per step do not divide over {world_size} ranks x {packs_per_micro_batch} packs per "
        f"micro-batch (batch.packs_per_micro_batch); use {steps} packs per step"
        + (f", or {', '.join(map(str, ranks))} ranks" if ranks else "")
    )


def split_step(pack_ids: Ids, costs: Ids, *, world_size: int, packs_per_micro_batch: int) -> list[list[Ids]]:
    """Return the packs of every micro-batch of every rank, [world_size][num_micro_batches].

    Packs are sorted by cost and cut into groups, one per micro-batch index, so that what the ranks run at the same
    time costs about the same; within a group they are dealt forwards and backwards. Every rank gets the same number of
    micro-batches; in a short last step some of them are empty.
    """
    group_size = world_size * packs_per_micro_batch
    order = pack_ids[np.lexsort((np.arange(len(pack_ids)), -costs))]
    ranks: list[list[Ids]] = [[] for _ in range(world_size)]
    for start in range(0, len(order), group_size):
        group = order[start : start + group_size]
        lap, place = np.divmod(np.arange(len(group)), world_size)
        rank_of = np.where(lap % 2, world_size - 1 - place, place)
        for rank in range(world_size):
            ranks[rank].append(group[rank_of == rank])
    return ranks


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
