"""Best-fit-decreasing packing over the length histogram: which samples share a pack, from integers
alone.

    lengths      5 3 3 2 2 1   capacity 8
    pack 0     [ a a a a a b b b ]    longest first, into the fullest pack that has room
    pack 1     [ c c c d d e e f ]
    order        a b c d e f          pack_offsets 0 2 6

Samples of one length are interchangeable to the algorithm, so it places counts, not samples: packs
that have the same room left are one bucket, and a length class moves whole runs of packs from
bucket to bucket. Only rooms that some pack has are kept: memory follows the lengths that exist,
whatever the capacity.
"""

from bisect import bisect_left, insort
from collections import deque

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def pack_best_fit(
    lengths: Ints, *, capacity: int, tie_break: npt.NDArray[np.uint64]
) -> tuple[Ints, Ints]:
    """Return `order` int64 [N] (sample indices, pack after pack) and `pack_offsets` int64 [P+1]
    (bounds in `order`).

    Samples of equal length are taken in the order of `tie_break` uint64 [N], then of index. Packs
    come in the order of the tie-break of their longest sample: with hashes that is a shuffle, so
    that no shard holds only long samples. Inside a pack the longest sample comes first. The result
    depends on (length, tie_break) pairs alone, not on input order, unless two samples agree in
    both. Raises ValueError for a length below 1 or above `capacity`.
    """
    if lengths.shape != tie_break.shape or lengths.ndim != 1:
        raise ValueError(
            f"lengths {lengths.shape} and tie_break {tie_break.shape} must be one-dimensional and"
            " equally long"
        )
    if not len(lengths):
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    if int(lengths.min()) < 1 or int(lengths.max()) > capacity:
        raise ValueError(
            f"lengths span {lengths.min()} to {lengths.max()}; expected 1 to the capacity"
            f" {capacity}"
        )
    by_tie = np.argsort(tie_break, kind="stable")  # int64 [N]
    longest_first = by_tie[
        _stable_order(int(lengths.max()) - lengths[by_tie])
    ]  # int64 [N], by falling length, then tie_break, index
    pack_of, num_packs = _place(lengths[longest_first], capacity)

    first_of_pack = np.full(
        num_packs, -1, np.int64
    )  # [P] position in longest_first of the pack's longest sample
    first_of_pack[pack_of[::-1]] = np.arange(
        len(lengths) - 1, -1, -1
    )  # the last write wins: the smallest position
    rank_of_pack = np.empty(num_packs, np.int64)  # [P]
    rank_of_pack[np.argsort(tie_break[longest_first[first_of_pack]], kind="stable")] = np.arange(
        num_packs
    )

    pack_of = rank_of_pack[pack_of]
    order = longest_first[_stable_order(pack_of)]
    pack_offsets = np.zeros(num_packs + 1, np.int64)
    np.cumsum(np.bincount(pack_of, minlength=num_packs), out=pack_offsets[1:])
    return order, pack_offsets


def _place(falling: Ints, capacity: int) -> tuple[Ints, int]:
    """Return the pack of every sample, given their lengths from long to short, int64 [N], and the
    number of packs.

    A move (first_pack, num_packs, per_pack) puts `per_pack` samples into each of `num_packs`
    consecutive packs. A pack that took one sample of the class has less room than before, so it
    stays the best fit until the class no longer fits: it takes room // length at once.
    """
    buckets: dict[
        int, deque[tuple[int, int]]
    ] = {}  # by room left, none empty: runs (start, stop) of packs
    rooms: list[int] = []  # the keys of `buckets`, ascending
    moves: list[tuple[int, int, int]] = []
    num_packs = 0

    def move(start: int, stop: int, per_pack: int, room: int) -> None:
        moves.append((start, stop - start, per_pack))
        if room and room not in buckets:
            insort(rooms, room)
        if room:
            buckets.setdefault(room, deque()).append((start, stop))

    first_of_class = np.flatnonzero(np.diff(falling, prepend=0))  # [C] of all samples of one length
    counts = np.diff(first_of_class, append=len(falling))
    for length, left in zip(falling[first_of_class].tolist(), counts.tolist(), strict=True):
        while left:
            fitting = bisect_left(rooms, length)
            if fitting < len(rooms):
                room = rooms[fitting]
                start, stop = buckets[room].popleft()
            else:
                room, start = capacity, num_packs
                stop = start + -(-left // (capacity // length))
                num_packs = stop
            per_pack = room // length
            filled = min(stop - start, left // per_pack)
            rest = left - filled * per_pack if start + filled < stop else 0
            if filled:
                move(start, start + filled, per_pack, room - per_pack * length)
            if rest:
                move(start + filled, start + filled + 1, rest, room - rest * length)
            untouched = start + filled + (rest > 0)
            if untouched < stop:
                buckets[room].appendleft((untouched, stop))
            if room < capacity and not buckets[room]:
                del buckets[room]
                del rooms[bisect_left(rooms, room)]
            left -= filled * per_pack + rest
    return _expand(moves), num_packs


def _expand(moves: list[tuple[int, int, int]]) -> Ints:
    """Return the pack of every sample: each move spelled out, in order."""
    starts, counts, per_pack = np.array(moves, np.int64).T  # [M] each
    ends = np.cumsum(counts)
    packs = np.arange(ends[-1]) + np.repeat(
        starts - (ends - counts), counts
    )  # one entry per (move, pack)
    return np.repeat(packs, np.repeat(per_pack, counts))


def _stable_order(keys: Ints) -> Ints:
    """Return the stable ascending order of small non-negative keys, by 16-bit digits: numpy sorts
    those in O(N)."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    shift = 16
    while int(keys.max()) >> shift:
        digit = ((keys[order] >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
        shift += 16
    return order
