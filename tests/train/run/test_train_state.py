"""What a checkpoint holds besides the engine's state survives JSON, and counts every batch once."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from train_runs import train_here, write_inputs

from shared.shard_reader import open_shard_set
from train.config import LossConfig
from train.data.loader import StepLoader
from train.data.step_order import make_order
from train.run.checkpoint_layout import list_checkpoints, read_state_file
from train.run.train_state import Counters, WindowSums


def loaders(folder: Path, world_size: int) -> list[StepLoader]:
    """One loader for each rank, over an epoch of ten packs."""
    shard_set = open_shard_set(write_inputs(folder)[0])
    order = make_order(
        unit="pack",
        fingerprint=shard_set.manifest.fingerprint,
        seed=0,
        num_units=10,
        units_per_step=2,
        epochs=1,
        max_steps=None,
    )
    return [
        StepLoader(
            shard_set=shard_set,
            order=order,
            loss=LossConfig(),
            rank=rank,
            world_size=world_size,
            packs_per_micro_batch=1,
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_counters_are_the_same_on_every_rank_and_count_an_epoch_once(
    world_size: int, tmp_path: Path
) -> None:
    counters = []
    for loader in loaders(tmp_path, world_size):
        counters.append(Counters())
        for batch in loader.steps(0):
            counters[-1].add(batch)
    totals = loader.shard_set.manifest.totals
    assert all(other == counters[0] for other in counters)
    assert (counters[0].tokens, counters[0].loss_tokens) == (totals.tokens, totals.loss_tokens)
    assert counters[0].positions >= totals.tokens


def test_sums_come_back_from_json_bit_for_bit() -> None:
    """Also losses whose decimal form is long."""
    sums = WindowSums(
        losses=[math.pi, 1 / 3, 1e-300],
        balancing=[],
        source_losses=[0.1 + 0.2, math.nextafter(1.0, 2.0)],
        source_tokens=[2.0**53, 0.0],
        loss_tokens=2**60,
    )
    assert WindowSums(**json.loads(json.dumps(dataclasses.asdict(sums)))) == sums


def test_a_checkpoint_holds_exactly_these_fields(tmp_path: Path) -> None:
    """Their names are a format: a checkpoint of an earlier version must stay readable."""
    shards, recipe = write_inputs(tmp_path)
    call = ("--shards", shards, "--recipe", recipe, "--output", tmp_path / "run")
    assert train_here(*call, "--stop-after", 1).exit_code == 75
    (path,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    state = read_state_file(path)
    assert list(state["counters"]) == ["loss_tokens", "positions", "skipped_steps", "tokens"]
    names = ["balancing", "loss_tokens", "losses", "source_losses", "source_tokens"]
    assert sorted(state["window"]) == names
    assert (state["step"], state["eval_loss"]) == (1, None)
