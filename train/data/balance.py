"""Which rank runs what of a step, in which micro-batch: a step that is already fixed is divided,
never changed.

Units (packs, or conversations) are put together into micro-batches of similar cost, as few as their
sizes allow, the same number for each rank. Ranks wait for one another at every micro-batch, so
those that run at the same time are neighbours in cost.

    units          9 7 4 4 3 2 1            costs, at most two units each
    micro-batches  [9] [7] [4 1] [4] ...    put together, dearest first
    rank 0          9        4 1
    rank 1          7        4 ...          what stands in one column runs at the same time

Every sort and choice has a full tie-break, so that every rank comes to the same division by itself.
"""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]  # places in the order of the step

LINEAR_COST = 32768
"""What a token costs besides attention, in pairs of tokens that attend: 12 x the hidden size, here
of 2,700."""


def costs_of(lengths: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Return the cost of each unit, int64 [n], from the lengths of its sequences.

    In a layer of hidden size D, causal attention over l tokens takes l^2 D multiply-adds and
    everything else about 12 D^2 per token. Packs hold nearly equal numbers of tokens, so between
    them attention decides; between conversations the tokens do. Balance depends on the constant, a
    gradient never.
    """
    return np.array(
        [np.dot(length, length) + LINEAR_COST * length.sum() for length in lengths], np.int64
    )


def assign_micro_batches(
    sizes: npt.NDArray[np.int64], costs: npt.NDArray[np.int64], *, capacity: int, world_size: int
) -> list[list[Positions]]:
    """Return the positions of the units of every micro-batch of every rank,
    [world_size][num_micro_batches].

    `sizes` of a micro-batch add up to at most `capacity`, which no single size exceeds. Every rank
    gets the same number of micro-batches; where there are too few units some of them are empty.
    """
    fewest = _best_fit(sizes, capacity)
    num_bins = -(-len(fewest) // world_size) * world_size
    bins = _balanced(sizes, costs, capacity=capacity, num_bins=num_bins) or fewest
    bins += [[] for _ in range(num_bins - len(bins))]
    loads = [int(costs[members].sum()) for members in bins]
    costliest_first = sorted(range(num_bins), key=lambda number: (-loads[number], number))
    ranks: list[list[Positions]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for start in range(0, num_bins, world_size):
        least_loaded_first = sorted(range(world_size), key=lambda rank: (totals[rank], rank))
        for rank, number in zip(
            least_loaded_first, costliest_first[start : start + world_size], strict=True
        ):
            ranks[rank].append(np.array(sorted(bins[number]), np.int64))
            totals[rank] += loads[number]
    return ranks


def _best_fit(sizes: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each unit, largest first, goes where it leaves the least room."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for position in _largest_first(sizes):
        size = int(sizes[position])
        place = bisect_left(rooms, (size, 0))
        if place == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(place)
        bins[number].append(position)
        insort(rooms, (room - size, number))
    return bins


def _balanced(
    sizes: npt.NDArray[np.int64], costs: npt.NDArray[np.int64], *, capacity: int, num_bins: int
) -> list[list[int]] | None:
    """Each unit, dearest first, goes to the cheapest of `num_bins` bins that has room; None where
    none has."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    rooms = np.full(num_bins, capacity, np.int64)
    loads = np.zeros(num_bins, np.int64)
    for position in _largest_first(costs):
        cheapest = int(np.argmin(np.where(rooms >= sizes[position], loads, np.iinfo(np.int64).max)))
        if rooms[cheapest] < sizes[position]:
            return None
        bins[cheapest].append(position)
        rooms[cheapest] -= sizes[position]
        loads[cheapest] += costs[position]
    return bins


def _largest_first(values: npt.NDArray[np.int64]) -> list[int]:
    order: list[int] = np.lexsort((np.arange(len(values)), -values)).tolist()
    return order
