"""Packing: each sample once, no pack too full, as few packs as best-fit-decreasing, one answer for
one input."""

import bisect
import itertools
import subprocess
import sys
from collections import deque

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.selection.best_fit import pack_best_fit

CAPACITY = 50
a_batch = st.lists(st.integers(1, CAPACITY), max_size=200)


def distinct_ties(number: int, *, seed: int = 0) -> npt.NDArray[np.uint64]:
    return np.random.default_rng(seed).permutation(number).astype(np.uint64)


def pack_lengths(
    lengths: npt.NDArray[np.int64], order: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]
) -> list[list[int]]:
    return [lengths[order[start:stop]].tolist() for start, stop in itertools.pairwise(offsets)]


def number_of_packs_sample_by_sample(lengths: list[int], capacity: int) -> int:
    """Best-fit-decreasing as textbooks have it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = bisect.bisect_left(rooms, length)
        room = rooms.pop(fitting) if fitting < len(rooms) else capacity
        bisect.insort(rooms, room - length)
    return len(rooms)


@given(a_batch)
@settings(deadline=None)
def test_every_sample_is_in_exactly_one_pack(lengths: list[int]) -> None:
    order, offsets = pack_best_fit(
        np.array(lengths, np.int64), capacity=CAPACITY, tie_break=distinct_ties(len(lengths))
    )
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert offsets[0] == 0
    assert offsets[-1] == len(lengths)
    assert (np.diff(offsets) > 0).all()


@given(a_batch)
@settings(deadline=None)
def test_no_pack_exceeds_the_capacity(lengths: list[int]) -> None:
    array = np.array(lengths, np.int64)
    order, offsets = pack_best_fit(array, capacity=CAPACITY, tie_break=distinct_ties(len(lengths)))
    assert all(sum(pack) <= CAPACITY for pack in pack_lengths(array, order, offsets))


@given(a_batch)
@settings(max_examples=300, deadline=None)
def test_the_number_of_packs_is_that_of_plain_best_fit_decreasing(lengths: list[int]) -> None:
    _, offsets = pack_best_fit(
        np.array(lengths, np.int64), capacity=CAPACITY, tie_break=distinct_ties(len(lengths))
    )
    assert len(offsets) - 1 == number_of_packs_sample_by_sample(lengths, CAPACITY)


@given(a_batch, st.integers(0, 1000))
@settings(deadline=None)
def test_the_packs_do_not_depend_on_the_order_of_the_input(lengths: list[int], seed: int) -> None:
    array, tie = np.array(lengths, np.int64), distinct_ties(len(lengths))
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order, offsets = pack_best_fit(array, capacity=CAPACITY, tie_break=tie)
    other_order, other_offsets = pack_best_fit(
        array[shuffled], capacity=CAPACITY, tie_break=tie[shuffled]
    )
    assert np.array_equal(order, shuffled[other_order])
    assert np.array_equal(offsets, other_offsets)


def test_equal_ties_fall_back_to_the_index() -> None:
    order, offsets = pack_best_fit(
        np.full(6, 3, np.int64), capacity=6, tie_break=np.zeros(6, np.uint64)
    )
    assert order.tolist() == [0, 1, 2, 3, 4, 5]
    assert offsets.tolist() == [0, 2, 4, 6]


def test_neighbours_of_equal_length_are_dealt_to_different_packs() -> None:
    number = 10_000
    order, offsets = pack_best_fit(
        np.full(number, 10, np.int64), capacity=100, tie_break=distinct_ties(number)
    )
    pack_of = np.empty(number, np.int64)
    pack_of[order] = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    assert (pack_of[1:] == pack_of[:-1]).mean() < 0.01


def test_packs_are_not_sorted_by_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 5000)
    order, offsets = pack_best_fit(lengths, capacity=1000, tie_break=distinct_ties(len(lengths)))
    longest = lengths[order[offsets[:-1]]]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.1


@pytest.mark.parametrize("capacity", [1024, 2048, 4096, 8192, 32768])
def test_a_chat_length_histogram_packs_to_99_9_percent(capacity: int) -> None:
    drawn = np.random.default_rng(0).lognormal(np.log(168), 1.13, 300_000)
    lengths = np.clip(drawn, 8, capacity).astype(np.int64)
    _, offsets = pack_best_fit(lengths, capacity=capacity, tie_break=distinct_ties(len(lengths)))
    assert lengths.sum() / ((len(offsets) - 1) * capacity) >= 0.999


def test_more_than_65536_packs_keep_their_samples() -> None:
    order, offsets = pack_best_fit(
        np.full(70_000, 2, np.int64), capacity=3, tie_break=distinct_ties(70_000)
    )
    assert len(offsets) == 70_001
    assert len(np.unique(order)) == 70_000


@pytest.mark.parametrize("length", [0, -1, CAPACITY + 1])
def test_a_length_that_no_pack_can_hold_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to the capacity 50"):
        pack_best_fit(
            np.array([1, length], np.int64), capacity=CAPACITY, tie_break=distinct_ties(2)
        )


def packs_sample_by_sample(
    lengths: npt.NDArray[np.int64], capacity: int, tie: npt.NDArray[np.uint64]
) -> tuple[list[int], list[int]]:
    """The same packs, one sample after the other: of the packs with the least room that fits, the
    one longest so."""
    longest_first = sorted(
        range(len(lengths)), key=lambda index: (-lengths[index], tie[index], index)
    )
    rooms: list[list[deque[int]]] = [
        [] for _ in range(capacity + 1)
    ]  # by room left: runs of packs, oldest first
    packs: list[list[int]] = []
    for length, group in itertools.groupby(longest_first, key=lambda index: int(lengths[index])):
        waiting = deque(group)
        while waiting:
            room = next((room for room in range(length, capacity + 1) if rooms[room]), capacity)
            run = (
                rooms[room][0]
                if rooms[room]
                else deque(range(len(packs), len(packs) + len(waiting)))
            )
            packs += [
                []
                for _ in range(
                    len(packs), max([len(packs), *(p + 1 for p in run)]) if room == capacity else 0
                )
            ]
            filled: dict[int, deque[int]] = {}
            while run and waiting:
                pack = run.popleft()
                number = min(room // length, len(waiting))
                packs[pack] += [waiting.popleft() for _ in range(number)]
                filled.setdefault(room - number * length, deque()).append(pack)
            if not run and rooms[room]:
                rooms[room].pop(0)
            for left, done in filled.items():
                if left:
                    rooms[left].append(done)
    packs = [pack for pack in packs if pack]
    ranked = sorted(range(len(packs)), key=lambda pack: (tie[packs[pack][0]], pack))
    order = [index for pack in ranked for index in packs[pack]]
    return order, [0, *itertools.accumulate(len(packs[pack]) for pack in ranked)]


@given(a_batch, st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_the_packs_are_those_of_placing_sample_by_sample(lengths: list[int], seed: int) -> None:
    array, tie = np.array(lengths, np.int64), distinct_ties(len(lengths), seed=seed)
    order, offsets = pack_best_fit(array, capacity=CAPACITY, tie_break=tie)
    expected_order, expected_offsets = packs_sample_by_sample(array, CAPACITY, tie)
    assert order.tolist() == expected_order
    assert offsets.tolist() == expected_offsets


_PEAK_OF_ONE_PACK = """
import resource, numpy as np
from prep.selection.best_fit import pack_best_fit
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
lengths, tie_break = np.array([90, 30_000_000, 7]), np.arange(3, dtype=np.uint64)
order, offsets = pack_best_fit(lengths, capacity=10**9, tie_break=tie_break)
assert offsets.tolist() == [0, 3]
print(peak() - before)
"""


def test_memory_follows_the_samples_and_not_the_capacity_or_their_length() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _PEAK_OF_ONE_PACK], capture_output=True, text=True, check=True
    )
    assert int(ended.stdout) < 50_000  # KiB
