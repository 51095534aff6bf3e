"""The order holds every pack or conversation once per epoch, as a pure function of fingerprint and
seed."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError
from train.config import BatchConfig
from train.data.step_order import (
    StepOrder,
    Unit,
    check_divides,
    make_order,
    permute,
    units_per_step,
)

UNITS: tuple[Unit, ...] = ("pack", "conversation")


def order_of(
    num_units: int,
    per_step: int,
    epochs: float,
    *,
    seed: int = 0,
    fingerprint: str = "f",
    unit: Unit = "pack",
) -> StepOrder:
    return make_order(
        unit=unit,
        fingerprint=fingerprint,
        seed=seed,
        num_units=num_units,
        units_per_step=per_step,
        epochs=epochs,
        max_steps=None,
    )


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_single_images_are_those_of_the_whole_permutation_at_any_size() -> None:
    whole = permute(np.arange(1000), 1000, 7)
    assert permute(np.array([17, 900]), 1000, 7).tolist() == whole[[17, 900]].tolist()
    size = 10**15
    images = permute(np.arange(size - 500, size), size, 1)
    assert len(set(images.tolist())) == 500
    assert images.min() >= 0
    assert images.max() < size


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_permutations_look_random(size: int) -> None:
    """Each pack is at each position equally often, and one order predicts little of the next."""
    images = np.stack([permute(np.arange(size), size, key) for key in range(600)])
    mean, deviation = images.mean(axis=0), (size - 1) / np.sqrt(12) / np.sqrt(600)
    assert np.abs(mean - (size - 1) / 2).max() < 5 * deviation
    correlation = np.corrcoef(images[0], images[1])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(size)


GOLDEN: dict[Unit, list[list[int]]] = {
    "pack": [[9, 8, 3, 0], [6, 7, 1, 2], [4, 5, 5, 4], [1, 9, 6, 0], [2, 3, 8, 7]],
    "conversation": [[0, 6, 3, 2], [4, 9, 8, 7], [1, 5, 9, 3], [8, 7, 0, 1], [2, 5, 4, 6]],
}


@pytest.mark.parametrize("unit", UNITS)
def test_the_order_is_golden(unit: Unit) -> None:
    """These numbers are part of every checkpoint: if they change, a resumed run sees other
    packs."""
    order = order_of(10, 4, 2, seed=8, fingerprint="abc", unit=unit)
    assert [order.step(step).tolist() for step in range(order.total_steps)] == GOLDEN[unit]


@settings(deadline=None, max_examples=60)
@given(
    num_units=st.integers(1, 50),
    per_step=st.integers(1, 20),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 99),
    unit=st.sampled_from(UNITS),
)
def test_every_unit_once_per_epoch(
    num_units: int, per_step: int, epochs: int, seed: int, unit: Unit
) -> None:
    order = order_of(num_units, per_step, epochs, seed=seed, unit=unit)
    ids = np.concatenate([order.step(step) for step in range(order.total_steps)])
    for epoch in range(epochs):
        assert sorted(ids[epoch * num_units : (epoch + 1) * num_units]) == list(range(num_units))
    assert len(ids) == epochs * num_units
    assert order.total_steps == -(-epochs * num_units // per_step)
    assert all(len(order.step(step)) == per_step for step in range(order.total_steps - 1))
    assert order.epoch_after(order.total_steps) == epochs


def test_orders_differ_by_epoch_seed_fingerprint_and_unit() -> None:
    def first(**changes: object) -> list[int]:
        return order_of(50, 50, 1, **changes).step(0).tolist()  # type: ignore[arg-type]

    assert first() == first()
    assert first() != first(seed=1)
    assert first() != first(fingerprint="g")
    assert first() != first(unit="conversation")
    two = order_of(50, 50, 2)
    assert two.step(0).tolist() != two.step(1).tolist()


def test_max_steps_sets_the_length_and_every_step_is_full() -> None:
    order = make_order(
        unit="pack", fingerprint="f", seed=0, num_units=5, units_per_step=4, epochs=1, max_steps=7
    )
    assert order.total_steps == 7
    assert [len(order.step(step)) for step in range(7)] == [4] * 7


def test_sizes_that_divide_are_accepted_and_others_list_them() -> None:
    for world, per_micro in product((1, 2, 4, 8), (1, 2)):
        check_divides(packs_per_step=16, packs_per_micro_batch=per_micro, world_size=world)
    with pytest.raises(ConfigError, match=r"use 14 or 21 packs per step, or 1, 2, 4, 8, 16 ranks"):
        check_divides(packs_per_step=16, packs_per_micro_batch=1, world_size=7)
    with pytest.raises(ConfigError, match=r"use 32 packs per step, or 1, 2, 4, 8 ranks"):
        check_divides(packs_per_step=16, packs_per_micro_batch=2, world_size=16)


def test_a_step_has_packs_tokens_or_conversations() -> None:
    assert units_per_step(BatchConfig(tokens_per_step=65536), max_seq_len=4096) == ("pack", 16)
    assert units_per_step(BatchConfig(packs_per_step=3), max_seq_len=4096) == ("pack", 3)
    assert units_per_step(BatchConfig(conversations_per_step=128), max_seq_len=4096) == (
        "conversation",
        128,
    )
    with pytest.raises(ConfigError, match="use 4096 or 8192"):
        units_per_step(BatchConfig(tokens_per_step=5000), max_seq_len=4096)
    with pytest.raises(ConfigError, match=r"use 4096$"):
        units_per_step(BatchConfig(tokens_per_step=100), max_seq_len=4096)
