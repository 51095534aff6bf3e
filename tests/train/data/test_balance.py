"""The division of a step: nothing lost or added, capacity kept, equally many micro-batches, similar
costs."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.balance import Positions, assign_micro_batches, costs_of


def divide_packs(
    costs: list[int], *, world_size: int, per_micro_batch: int
) -> list[list[Positions]]:
    sizes = np.ones(len(costs), np.int64)
    return assign_micro_batches(
        sizes, np.array(costs, np.int64), capacity=per_micro_batch, world_size=world_size
    )


def divide_conversations(
    lengths: list[int], *, world_size: int, capacity: int
) -> list[list[Positions]]:
    costs = costs_of([np.array([length]) for length in lengths])
    return assign_micro_batches(
        np.array(lengths, np.int64), costs, capacity=capacity, world_size=world_size
    )


def flat(ranks: list[list[Positions]]) -> list[int]:
    return sorted(
        int(position) for rank in ranks for micro_batch in rank for position in micro_batch
    )


@settings(deadline=None, max_examples=100)
@given(units=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=20), min_size=2))
def test_short_conversations_cost_what_their_tokens_cost(units: list[list[int]]) -> None:
    """Of up to 300 tokens attention takes less than 1 %: 300 pairs against 32,768 for a token."""
    lengths = [np.array(unit) for unit in units]
    per_token = costs_of(lengths) / np.array([length.sum() for length in lengths])
    assert per_token.max() <= 1.01 * per_token.min()


@settings(deadline=None, max_examples=100)
@given(bounds=st.lists(st.integers(1, 8191), max_size=30))
def test_packs_of_equally_many_tokens_cost_the_same_within_a_quarter(bounds: list[int]) -> None:
    """However 8,192 tokens are split, the rest of a layer costs four times as much as attention."""
    split = np.diff([0, *sorted(set(bounds)), 8192])
    whole, parts = costs_of([np.array([8192]), split])
    assert parts <= whole <= 1.25 * parts


@settings(deadline=None, max_examples=100)
@given(left=st.integers(1, 10**5), right=st.integers(1, 10**5))
def test_a_cut_saves_the_pairs_that_no_longer_attend(left: int, right: int) -> None:
    whole, cut = costs_of([np.array([left + right]), np.array([left, right])])
    assert whole - cut == 2 * left * right


@settings(deadline=None, max_examples=60)
@given(
    costs=st.lists(st.integers(1, 10**6), min_size=1, max_size=24),
    world_size=st.integers(1, 5),
    per_micro_batch=st.integers(1, 3),
)
def test_ranks_divide_the_packs_of_a_step(
    costs: list[int], world_size: int, per_micro_batch: int
) -> None:
    ranks = divide_packs(costs, world_size=world_size, per_micro_batch=per_micro_batch)
    assert flat(ranks) == list(range(len(costs)))
    num_micro_batches = -(-len(costs) // (world_size * per_micro_batch))
    assert [len(rank) for rank in ranks] == [num_micro_batches] * world_size
    assert all(len(micro_batch) <= per_micro_batch for rank in ranks for micro_batch in rank)


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    world_size=st.integers(1, 9),
    rows=st.integers(1, 3),
)
def test_ranks_divide_the_conversations_of_a_step(
    lengths: list[int], world_size: int, rows: int
) -> None:
    capacity = 100 * rows
    ranks = divide_conversations(lengths, world_size=world_size, capacity=capacity)
    assert flat(ranks) == list(range(len(lengths)))
    num_micro_batches = len(ranks[0])
    assert [len(rank) for rank in ranks] == [num_micro_batches] * world_size
    sums = [sum(lengths[i] for i in micro_batch) for rank in ranks for micro_batch in rank]
    assert max(sums) <= capacity
    # best-fit decreasing needs at most 11/9 of the fewest bins + 1 (Johnson 1974), here rounded up
    # to whole ranks
    fewest = -(-sum(lengths) // capacity)
    assert num_micro_batches <= -(-(11 * fewest // 9 + 2) // world_size)


def test_ranks_run_packs_of_similar_cost_at_the_same_time() -> None:
    rng = np.random.default_rng(0)
    costs = rng.lognormal(12, 1, 64).astype(np.int64)
    ranks = divide_packs(costs.tolist(), world_size=8, per_micro_batch=1)
    sorted_wait = sum(max(costs[rank[m][0]] for rank in ranks) for m in range(8))
    unsorted_wait = costs.reshape(8, 8).max(axis=1).sum()
    assert sorted_wait < 0.6 * unsorted_wait


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), world_size=st.integers(1, 5))
def test_micro_batches_that_run_at_the_same_time_are_neighbours_in_cost(
    lengths: list[int], world_size: int
) -> None:
    ranks = divide_conversations(lengths, world_size=world_size, capacity=100)
    costs = costs_of([np.array([length]) for length in lengths])
    columns = [[int(costs[rank[m]].sum()) for rank in ranks] for m in range(len(ranks[0]))]
    for costlier, cheaper in pairwise(columns):
        assert min(costlier) >= max(cheaper)


def test_costly_packs_share_a_micro_batch_with_cheap_ones() -> None:
    ranks = divide_packs([40, 30, 20, 10], world_size=2, per_micro_batch=2)
    assert [[micro_batch.tolist() for micro_batch in rank] for rank in ranks] == [
        [[0, 3]],
        [[1, 2]],
    ]


def test_no_rank_gets_the_costliest_micro_batch_every_time() -> None:
    ranks = divide_packs([80, 70, 60, 50, 40, 30, 20, 10], world_size=2, per_micro_batch=1)
    assert [sum((8 - rank[m][0]) * 10 for m in range(4)) for rank in ranks] == [180, 180]


def test_conversations_spread_over_all_ranks_though_fewer_rows_would_hold_them() -> None:
    ranks = divide_conversations([50] * 16, world_size=8, capacity=1000)
    assert [[len(micro_batch) for micro_batch in rank] for rank in ranks] == [[2]] * 8


def test_if_balance_leaves_no_room_the_tightest_packing_is_used() -> None:
    """Spread by cost, 60 40 | 50 50 would not come about from 60 50 50 40."""
    ranks = divide_conversations([50, 60, 40, 50], world_size=1, capacity=100)
    assert sorted(sorted(micro_batch.tolist()) for micro_batch in ranks[0]) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_equal_costs_are_divided_the_same_way_every_time(world_size: int) -> None:
    one, two = (divide_packs([7] * 24, world_size=world_size, per_micro_batch=2) for _ in range(2))
    assert all(
        np.array_equal(a, b)
        for x, y in zip(one, two, strict=True)
        for a, b in zip(x, y, strict=True)
    )
