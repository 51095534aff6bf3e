"""Best-fit-decreasing packing: which samples share a pack, decided from their lengths alone.

    lengths      5 3 3 2 2 1   capacity 8
    pack 0     [ a a a a a b b b ]    longest first, into the fullest pack that has room
    pack 1     [ c c c d d e e f ]
    order        a b c d e f          pack_offsets 0 2 6

Samples of one length are interchangeable, and so are packs with the same room left. So the
algorithm moves counts, not samples: packs with equal room lie in one bucket, and all samples of a
length move whole runs of packs from bucket to bucket: a million chat samples at capacity 4096 are
12,000 moves.
"""

from bisect import bisect_left, insort
from collections import defaultdict, deque

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def pack_best_fit(
    lengths: Ints, *, capacity: int, tie_break: npt.NDArray[np.uint64]
) -> tuple[Ints, Ints]:
    """Return `order` int64 [N] and `pack_offsets` int64 [P+1].

    `order` holds sample indices, pack after pack, the longest sample of a pack first; the packs are
    bounded by `pack_offsets`. Samples of equal length are taken in the order of `tie_break` uint64
    [N], then of index. Packs come in the order of the tie-break of their longest sample: with
    hashes that is a shuffle, so that no shard holds only long samples. The result depends on
    (length, tie_break) pairs alone, not on input order, unless two samples agree in both.

    Raises ValueError for a length below 1 or above `capacity`.
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
    # Two stable sorts: by tie-break, then by falling length.
    by_tie = np.argsort(tie_break, kind="stable")  # int64 [N]
    longest_first = by_tie[_stable_order(int(lengths.max()) - lengths[by_tie])]  # int64 [N]
    pack_of, num_packs = _assign_packs(lengths[longest_first], capacity)

    # The longest sample of a pack is the first that went into it. Written backwards, the smallest
    # position is the last to be written, and so the one that stays.
    first_of_pack = np.empty(num_packs, np.int64)  # [P] positions in longest_first
    first_of_pack[pack_of[::-1]] = np.arange(len(lengths) - 1, -1, -1)
    # Packs come out of the algorithm by falling length. Their tie-breaks put them in random order.
    by_rank = np.argsort(tie_break[longest_first[first_of_pack]], kind="stable")
    rank_of_pack = np.empty(num_packs, np.int64)  # [P]
    rank_of_pack[by_rank] = np.arange(num_packs)

    pack_of = rank_of_pack[pack_of]
    order = longest_first[_stable_order(pack_of)]
    pack_offsets = np.zeros(num_packs + 1, np.int64)
    np.cumsum(np.bincount(pack_of, minlength=num_packs), out=pack_offsets[1:])
    return order, pack_offsets


def _assign_packs(falling: Ints, capacity: int) -> tuple[Ints, int]:
    """Return the pack of every sample, int64 [N], and the number of packs.

    `falling` are the lengths of the samples, the longest first.
    """
    # Runs (start, stop) of consecutive packs, by the room that each pack of the run has left.
    # `rooms` are the keys in ascending order: the best fit is the first that is long enough.
    buckets: defaultdict[int, deque[tuple[int, int]]] = defaultdict(deque)
    rooms: list[int] = []
    moves: list[tuple[int, int, int]] = []  # (first pack, number of packs, samples for each)
    num_packs = 0

    def move(start: int, stop: int, per_pack: int, room_left: int) -> None:
        moves.append((start, stop - start, per_pack))
        if room_left:
            if room_left not in buckets:
                insort(rooms, room_left)
            buckets[room_left].append((start, stop))

    first_of_class = np.flatnonzero(np.diff(falling, prepend=0))  # [C] of all samples of one length
    counts = np.diff(first_of_class, append=len(falling))
    for length, left in zip(falling[first_of_class].tolist(), counts.tolist(), strict=True):
        while left:
            fitting = bisect_left(rooms, length)
            if fitting < len(rooms):
                room = rooms[fitting]
                start, stop = buckets[room].popleft()
            else:
                # No pack has room: open as many as the rest of the class needs.
                room, start = capacity, num_packs
                num_packs = stop = start + -(-left // (capacity // length))
            # A pack that took one sample of the class has less room than before, so it stays the
            # best fit until the class no longer fits: it takes room // length samples at once.
            per_pack = room // length
            filled = min(stop - start, left // per_pack)
            end = start + filled
            if filled:
                move(start, end, per_pack, room - per_pack * length)
                left -= filled * per_pack
            if left and end < stop:
                # The last samples of the class do not fill their pack.
                move(end, end + 1, left, room - left * length)
                end, left = end + 1, 0
            if end < stop:
                buckets[room].appendleft((end, stop))
            elif room < capacity and not buckets[room]:
                del buckets[room]
                rooms.remove(room)
    # Spell the moves out: first one entry per (move, pack), then one per sample.
    starts, sizes, per_pack_of = np.array(moves, np.int64).T  # [M] each
    ends = np.cumsum(sizes)
    packs = np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)
    return np.repeat(packs, np.repeat(per_pack_of, sizes)), num_packs


def _stable_order(keys: Ints) -> Ints:
    """Return the stable ascending order of small non-negative keys.

    Sorts by digits of 16 bits: numpy sorts those in O(N).
    """
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    shift = 16
    while int(keys.max()) >> shift:
        digit = ((keys[order] >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
        shift += 16
    return order
