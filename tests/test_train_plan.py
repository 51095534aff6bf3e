"""The plan: every pack once per epoch, the same steps for any number of ranks, the same work for every rank."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError
from train.plan import PackOrder, check_divides, make_order, packs_per_step, permute, split_step


def order_of(num_packs: int, per_step: int, epochs: float, *, seed: int = 0, fingerprint: str = "f") -> PackOrder:
    return make_order(
        fingerprint=fingerprint, seed=seed, num_packs=num_packs, packs_per_step=per_step, epochs=epochs, max_steps=None
    )


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permute_needs_no_neighbours_and_takes_huge_sizes() -> None:
    whole = permute(np.arange(1000), 1000, 7)
    assert permute(np.array([17, 900]), 1000, 7).tolist() == whole[[17, 900]].tolist()
    size = 10**15
    images = permute(np.arange(size - 500, size), size, 1)
    assert len(set(images.tolist())) == 500
    assert images.min() >= 0
    assert images.max() < size


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_permutations_look_random(size: int) -> None:
    """Each pack falls on each position about equally often, and one order says little about the next."""
    images = np.stack([permute(np.arange(size), size, key) for key in range(600)])
    mean, deviation = images.mean(axis=0), (size - 1) / np.sqrt(12) / np.sqrt(600)
    assert np.abs(mean - (size - 1) / 2).max() < 5 * deviation
    correlation = np.corrcoef(images[0], images[1])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(size)


def test_the_order_is_golden() -> None:
    """These numbers are part of every checkpoint: if they change, a resumed run sees other packs."""
    order = order_of(10, 4, 2, seed=8, fingerprint="abc")
    assert [order.step(step).tolist() for step in range(order.total_steps)] == GOLDEN


GOLDEN = [[9, 8, 3, 0], [6, 7, 1, 2], [4, 5, 5, 4], [1, 9, 6, 0], [2, 3, 8, 7]]


@settings(deadline=None, max_examples=60)
@given(num_packs=st.integers(1, 50), per_step=st.integers(1, 20), epochs=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_pack_once_per_epoch(num_packs: int, per_step: int, epochs: int, seed: int) -> None:
    order = order_of(num_packs, per_step, epochs, seed=seed)
    packs = np.concatenate([order.step(step) for step in range(order.total_steps)])
    for epoch in range(epochs):
        assert sorted(packs[epoch * num_packs : (epoch + 1) * num_packs]) == list(range(num_packs))
    assert len(packs) == epochs * num_packs
    assert order.total_steps == -(-epochs * num_packs // per_step)
    assert all(len(order.step(step)) == per_step for step in range(order.total_steps - 1))
    assert order.epoch_after(order.total_steps) == epochs


def test_orders_differ_by_epoch_seed_and_fingerprint() -> None:
    def first(**changes: object) -> list[int]:
        return order_of(50, 50, 1, **changes).step(0).tolist()  # type: ignore[arg-type]

    assert first() == first()
    assert first() != first(seed=1)
    assert first() != first(fingerprint="g")
    two = order_of(50, 50, 2)
    assert two.step(0).tolist() != two.step(1).tolist()


def test_max_steps_sets_the_length_and_every_step_is_full() -> None:
    order = make_order(fingerprint="f", seed=0, num_packs=5, packs_per_step=4, epochs=1, max_steps=7)
    assert order.total_steps == 7
    assert [len(order.step(step)) for step in range(7)] == [4] * 7


@settings(deadline=None, max_examples=60)
@given(
    num_packs=st.integers(1, 24), world_size=st.integers(1, 5), per_micro_batch=st.integers(1, 3),
    costs=st.lists(st.integers(1, 10**6), min_size=24, max_size=24),
)  # fmt: skip
def test_ranks_divide_the_packs_of_a_step(
    num_packs: int, world_size: int, per_micro_batch: int, costs: list[int]
) -> None:
    pack_ids = np.arange(100, 100 + num_packs)
    ranks = split_step(
        pack_ids, np.array(costs[:num_packs]), world_size=world_size, packs_per_micro_batch=per_micro_batch
    )
    assert sorted(i for rank in ranks for micro_batch in rank for i in micro_batch) == pack_ids.tolist()
    num_micro_batches = -(-num_packs // (world_size * per_micro_batch))
    assert [len(rank) for rank in ranks] == [num_micro_batches] * world_size
    assert all(len(micro_batch) <= per_micro_batch for rank in ranks for micro_batch in rank)


def test_ranks_run_packs_of_similar_cost_at_the_same_time() -> None:
    rng = np.random.default_rng(0)
    costs = rng.lognormal(12, 1, 64).astype(np.int64)
    ranks = split_step(np.arange(64), costs, world_size=8, packs_per_micro_batch=1)
    sorted_wait = sum(max(costs[rank[m][0]] for rank in ranks) for m in range(8))
    unsorted_wait = costs.reshape(8, 8).max(axis=1).sum()
    assert sorted_wait < 0.6 * unsorted_wait


def test_packs_of_a_micro_batch_are_dealt_forwards_and_backwards() -> None:
    ranks = split_step(np.arange(4), np.array([40, 30, 20, 10]), world_size=2, packs_per_micro_batch=2)
    assert [[micro_batch.tolist() for micro_batch in rank] for rank in ranks] == [[[0, 3]], [[1, 2]]]


def test_what_divides_is_accepted_and_the_rest_names_it() -> None:
    for world, per_micro in product((1, 2, 4, 8), (1, 2)):
        check_divides(packs_per_step=16, packs_per_micro_batch=per_micro, world_size=world)
    with pytest.raises(ConfigError, match=r"use 14 or 21 packs per step, or 1, 2, 4, 8, 16 ranks"):
        check_divides(packs_per_step=16, packs_per_micro_batch=1, world_size=7)
    with pytest.raises(ConfigError, match=r"use 32 packs per step, or 1, 2, 4, 8 ranks"):
        check_divides(packs_per_step=16, packs_per_micro_batch=2, world_size=16)


def test_tokens_per_step_is_a_number_of_packs() -> None:
    assert packs_per_step(packs=None, tokens=65536, max_seq_len=4096) == 16
    assert packs_per_step(packs=3, tokens=None, max_seq_len=4096) == 3
    with pytest.raises(ConfigError, match="use 4096 or 8192"):
        packs_per_step(packs=None, tokens=5000, max_seq_len=4096)
    with pytest.raises(ConfigError, match=r"use 4096$"):
        packs_per_step(packs=None, tokens=100, max_seq_len=4096)
