"""The size of the data: counted in a shard set, or assumed and named where there is none yet."""

from pathlib import Path

import pytest
from estimates import STATED, planned, write_recipe_8b
from train_runs import train_here, write_inputs

from shared.shard_reader import open_shard_set


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def recipe_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe_8b(tmp_path_factory.mktemp("8b"))


def test_sizes_are_counted_in_the_shard_set(inputs: tuple[Path, Path]) -> None:
    shards, recipe = inputs
    shard_set = open_shard_set(shards)
    plan = planned("--shards", shards, "--recipe", recipe, "--gpus", 2)
    lengths = [
        int(length) for pack in range(shard_set.num_packs) for length in shard_set.seq_lengths(pack)
    ]
    totals = shard_set.manifest.totals
    data = plan["data"]
    assert data["squared_lengths"] == sum(length**2 for length in lengths)
    assert (data["packs"], data["sequences"]) == (10, len(lengths))
    assert (data["tokens"], data["loss_tokens"]) == (totals.tokens, totals.loss_tokens)
    assert data["assumptions"] == []


def test_a_plan_of_stated_sizes_lists_what_it_assumes(recipe_8b: Path) -> None:
    plan = planned(*STATED, "--recipe", recipe_8b)
    assert plan["data"]["shards"] is None
    assert plan["data"]["packs"] == -(-460_000_000 // 4096)
    assert len(plan["data"]["assumptions"]) == 3
    text = train_here("plan", *STATED, "--recipe", recipe_8b).stdout
    assert text.count("assumed: ") == 3


def test_the_assumed_squares_are_those_of_exponential_lengths(recipe_8b: Path) -> None:
    """A mean length of m gives 2 m^2; no sequence is longer than a pack."""
    rows, mean = 1000, 100
    sizes = ("--rows", rows, "--tokens", rows * mean, "--loss-tokens", 1)
    call = (*sizes, "--recipe", recipe_8b, "--max-seq-len")
    assert planned(*call, 4096)["data"]["squared_lengths"] == 2 * mean**2 * rows
    assert planned(*call, 150)["data"]["squared_lengths"] == 150 * mean * rows
