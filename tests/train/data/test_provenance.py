"""The rows of a step by name: all micro-batches together name exactly what the step holds."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from shard_sets import write_shard_set

from shared.shard_reader import ShardSet, open_shard_set
from train.data.provenance import first_few, micro_batch_rows, name_rows, step_rows
from train.data.step_order import Unit, make_order
from train.data.step_plan import plan_step

UNITS: tuple[Unit, ...] = ("pack", "conversation")


@pytest.fixture
def shard_set(tmp_path: Path) -> ShardSet:
    """Six packs of two rows; the first row of each comes from the second source."""
    packs = [[([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1])] for _ in range(6)]
    origins = [[(1, 2 * number, 0), (0, 2 * number + 1, 0)] for number in range(6)]
    names = ("chats", "maths")
    path = write_shard_set(
        tmp_path / "set", packs, max_seq_len=8, vocab_size=9, origins=origins, source_names=names
    )
    return open_shard_set(path)


@pytest.mark.parametrize(("unit", "world_size"), product(UNITS, (1, 2, 5)))
def test_the_micro_batches_of_all_ranks_name_the_rows_of_the_step(
    unit: Unit, world_size: int, shard_set: ShardSet
) -> None:
    num_units = shard_set.num_packs if unit == "pack" else shard_set.num_sequences
    order = make_order(
        unit=unit,
        fingerprint="f",
        seed=0,
        num_units=num_units,
        units_per_step=4,
        epochs=1,
        max_steps=None,
    )
    plan = plan_step(shard_set, order, 0, world_size=world_size, packs_per_micro_batch=1)
    rows = [
        row
        for rank in range(world_size)
        for number in range(len(plan.ranks[rank]))
        for row in micro_batch_rows(plan, rank, number, shard_set.manifest)
    ]
    assert rows == step_rows(plan, shard_set.manifest)
    assert len(rows) == len(set(rows)) == (8 if unit == "pack" else 4)
    for row in rows:
        source, number = row.split(":")
        assert source == ("chats" if int(number) % 2 else "maths")


def test_a_row_is_named_once_however_often_it_occurs(shard_set: ShardSet) -> None:
    origin = np.array([(1, 4, 0), (0, 4, 0), (1, 4, 30)])
    assert name_rows(origin, shard_set.manifest) == ["maths:4", "chats:4"]


def test_the_first_few_names_tell_how_many_follow() -> None:
    names = [f"a:{number}" for number in range(10)]
    assert first_few(names[:8]) == "a:0, a:1, a:2, a:3, a:4, a:5, a:6, a:7"
    assert first_few(names) == "a:0, a:1, a:2, a:3, a:4, a:5, a:6, a:7 and 2 more"
