"""Divide a step that is already fixed over the ranks, in micro-batches of similar cost.

Units (packs or conversations) are grouped into as few micro-batches as their sizes allow, the same
number for every rank. Ranks wait for one another after each micro-batch, so micro-batches that run
at the same time are neighbours in cost.

    units          9 7 4 4 3 2 1            costs; two units fit into a micro-batch
    micro-batches  [9] [7 1] [4 3] [4 2]    grouped, costliest first
    rank 0         [9]    [4 2]
    rank 1         [7 1]  [4 3]             a column runs at the same time

Sorts and choices leave no tie open, so every rank computes the same division without a message.
"""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]  # in the order of the step

# What a token costs besides attention, in pairs of tokens that attend: 12 x a hidden size of 2,700.
LINEAR_COST = 32768


def costs_of(lengths: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Return the cost of each unit, int64 [n], from the lengths of its sequences.

    In a layer of hidden size D, causal attention over l tokens takes l^2 D multiply-adds and
    everything else about 12 D^2 per token. Packs hold nearly equal numbers of tokens, so attention
    decides which of them is costlier; between conversations the tokens do. The constant affects
    balance only, never a gradient.
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
    gets the same number of micro-batches; if there are too few units, some of them are empty.
    """
    tightest = _best_fit(sizes, capacity)
    num_bins = -(-len(tightest) // world_size) * world_size
    bins = _balanced(sizes, costs, capacity=capacity, num_bins=num_bins) or tightest
    bins += [[] for _ in range(num_bins - len(bins))]
    loads = [int(costs[members].sum()) for members in bins]
    costliest_first = sorted(range(num_bins), key=lambda number: (-loads[number], number))
    ranks: list[list[Positions]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    # Of the micro-batches that run at the same time, the costliest goes to the rank with the least
    # work so far: otherwise rank 0 would get the costliest of every column.
    for start in range(0, num_bins, world_size):
        column = costliest_first[start : start + world_size]
        least_loaded_first = sorted(range(world_size), key=lambda rank: (totals[rank], rank))
        for rank, number in zip(least_loaded_first, column, strict=True):
            ranks[rank].append(np.array(sorted(bins[number]), np.int64))
            totals[rank] += loads[number]
    return ranks


def _best_fit(sizes: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each unit, largest first, goes where it leaves the least room."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for position in _largest_first(sizes):
        size = int(sizes[position])
        index = bisect_left(rooms, (size, 0))
        if index == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(index)
        bins[number].append(position)
        insort(rooms, (room - size, number))
    return bins


def _balanced(
    sizes: npt.NDArray[np.int64], costs: npt.NDArray[np.int64], *, capacity: int, num_bins: int
) -> list[list[int]] | None:
    """Each unit, costliest first, goes to the cheapest of `num_bins` bins that has room for it;
    None if no bin has."""
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
