"""A loss above median + sigma deviations is reported with the rows of its step."""

import json
import random
from pathlib import Path

import pytest
from shard_sets import random_packs, write_shard_set
from train_runs import train_here, write_inputs

from shared.shard_reader import open_shard_set
from train.config import LossConfig
from train.data.loader import StepLoader
from train.data.provenance import step_rows
from train.data.step_order import make_order
from train.loop.loss_spikes import SpikeLog


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> StepLoader:
    packs = random_packs(num_packs=6, max_seq_len=32, vocab_size=61)
    folder = tmp_path_factory.mktemp("set") / "set"
    shard_set = open_shard_set(write_shard_set(folder, packs, max_seq_len=32, vocab_size=61))
    order = make_order(
        unit="pack",
        fingerprint=shard_set.manifest.fingerprint,
        seed=0,
        num_units=6,
        units_per_step=2,
        epochs=1,
        max_steps=1000,
    )
    return StepLoader(
        shard_set=shard_set,
        order=order,
        loss=LossConfig(),
        rank=0,
        world_size=1,
        packs_per_micro_batch=1,
    )


def spikes_in(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_jump_is_reported_with_the_rows_of_its_step_and_noise_is_not(
    loader: StepLoader, tmp_path: Path
) -> None:
    noise = random.Random(0)
    losses = [2.0 + noise.gauss(0, 0.1) for _ in range(300)]
    losses[200] = 5.0
    log = SpikeLog(tmp_path / "spikes.jsonl", sigma=6.0, after_step=0)
    for start in range(0, 300, 10):
        log.check(list(range(start + 1, start + 11)), losses[start : start + 10], loader)
    (spike,) = spikes_in(tmp_path / "spikes.jsonl")
    assert spike["step"] == 201
    assert spike["loss"] == 5.0
    assert spike["rows"] == step_rows(loader.plan(200), loader.shard_set.manifest)
    assert spike["expected"] == pytest.approx(2.0, abs=0.05)


def test_a_falling_loss_is_no_spike_and_sigma_0_reports_none(
    loader: StepLoader, tmp_path: Path
) -> None:
    falling = [10.0 * 0.98**step for step in range(200)]
    steps, jump = list(range(1, 201)), [1.0] * 199 + [100.0]
    SpikeLog(tmp_path / "falling", sigma=6.0, after_step=0).check(steps, falling, loader)
    SpikeLog(tmp_path / "off", sigma=0.0, after_step=0).check(steps, jump, loader)
    assert spikes_in(tmp_path / "falling") == spikes_in(tmp_path / "off") == []


def test_fewer_than_20_losses_judge_nothing(loader: StepLoader, tmp_path: Path) -> None:
    log = SpikeLog(tmp_path / "spikes.jsonl", sigma=6.0, after_step=0)
    log.check(list(range(1, 21)), [1.0] * 19 + [50.0], loader)
    assert spikes_in(tmp_path / "spikes.jsonl") == []
    log.check([21], [50.0], loader)
    assert [spike["step"] for spike in spikes_in(tmp_path / "spikes.jsonl")] == [21]


def test_spikes_after_the_step_that_a_run_resumes_from_are_forgotten(
    loader: StepLoader, tmp_path: Path
) -> None:
    path = tmp_path / "spikes.jsonl"
    losses = [1.0] * 20 + [9.0] + [1.0] * 19 + [9.0]
    SpikeLog(path, sigma=6.0, after_step=0).check(list(range(1, 42)), losses, loader)
    assert [spike["step"] for spike in spikes_in(path)] == [21, 41]
    SpikeLog(path, sigma=6.0, after_step=30)
    assert [spike["step"] for spike in spikes_in(path)] == [21]


def test_a_run_reports_the_steps_of_its_spikes_also_if_a_record_stands_for_several(
    tmp_path: Path,
) -> None:
    """A tiny sigma makes spikes of ordinary noise; their losses are those that the run logs step by
    step."""
    shards, recipe = write_inputs(tmp_path)
    call = ("--shards", shards, "--recipe", recipe, "--max-steps", 40)
    # At this rate losses go up and down, and not only down.
    call += ("--set", "log.spike_sigma=0.01", "--set", "optim.learning_rate=1e-9")
    assert train_here(*call, "--output", tmp_path / "each").exit_code == 0
    seventh = ("--output", tmp_path / "seventh", "--set", "log.every_steps=7")
    assert train_here(*call, *seventh).exit_code == 0
    lines = (tmp_path / "each" / "metrics.jsonl").read_text().splitlines()
    losses = {record["step"]: record["train_loss"] for record in map(json.loads, lines)}
    spikes = spikes_in(tmp_path / "each" / "spikes.jsonl")
    assert spikes
    assert all(spike["loss"] == losses[spike["step"]] for spike in spikes)
    assert spikes_in(tmp_path / "seventh" / "spikes.jsonl") == spikes
