"""The loop: a run that was stopped anywhere ends as an undisturbed one; a step that is not finite
stops it."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import losses, records, status, train_here, weights, write_inputs

from train.loop import loop
from train.loop.schedule import learning_rate


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 8 steps."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train_here("--shards", inputs[0], "--recipe", inputs[1], "--output", run).exit_code == 0
    return run


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_run_stopped_and_started_again_logs_the_same_losses_and_ends_with_equal_weights(
    log_every: int, whole: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """The model has dropout: random generators are restored too. With log_every = 3 stops fall
    inside a window."""
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    call += ("--set", f"log.every_steps={log_every}")
    for _ in range(3):
        result = train_here(*call, "--stop-after", 2)
        assert result.exit_code == 75
        assert "stopped after step" in result.stderr
        assert status(run)["state"] == "stopped"
    assert train_here(*call).exit_code == 0
    expected = [loss for _, loss in losses(whole)]
    windows = [range(start, min(start + log_every, 8)) for start in range(0, 8, log_every)]
    assert losses(run) == [(w[-1] + 1, sum(expected[i] for i in w) / len(w)) for w in windows]
    tokens = {record["step"]: record["total_tokens"] for record in records(whole)}
    assert [record["total_tokens"] for record in records(run)] == [
        tokens[w[-1] + 1] for w in windows
    ]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(run)[name]), name


@pytest.mark.parametrize("way", ["SIGTERM", "SIGUSR1", "SIGINT", "STOP"])
def test_a_signal_or_a_file_saves_at_the_end_of_the_step(
    way: str, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    sent = []

    def rate_and_signal(step: int, **options: Any) -> float:
        if step == 2 and not sent:
            sent.append(way)
            (run / "STOP").touch() if way == "STOP" else os.kill(os.getpid(), signal.Signals[way])
        return learning_rate(step, **options)

    monkeypatch.setattr(loop, "learning_rate", rate_and_signal)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    result = train_here("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    assert result.exit_code == 75
    assert (run / "checkpoints" / "step-00000003").is_dir()
    assert (status(run)["state"], status(run)["exit_code"]) == ("stopped", 75)
    assert not (run / "STOP").exists()
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_request_to_stop_in_the_last_step_does_not_keep_the_run_from_its_end(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def rate_and_stop(step: int, **options: Any) -> float:
        if step == 7:
            (run / "STOP").touch()
        return learning_rate(step, **options)

    monkeypatch.setattr(loop, "learning_rate", rate_and_stop)
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    assert train_here(*call).exit_code == 0
    assert status(run)["state"] == "complete"
    assert not (run / "STOP").exists()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_stops_before_the_update_and_names_the_packs(
    stage: int, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = []

    def spoil(engine: Any, *arguments: Any) -> torch.Tensor:
        engines.append(engine)
        if len(engines) == 3:
            arguments[0][0].weights[0] = math.nan
        return accumulate(engine, *arguments)

    accumulate = loop.accumulate
    monkeypatch.setattr(loop, "accumulate", spoil)
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    result = train_here(*call, "--set", f"engine.zero_stage={stage}")
    assert result.exit_code == 4
    assert result.stderr.count("error:") == 1
    assert "step 3: the loss or a gradient is not finite" in result.stderr
    assert "Its packs: " in result.stderr
    assert status(run)["exit_code"] == 4
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    master = [p for group in engines[0].optimizer.param_groups for p in group["params"]]
    assert all(torch.isfinite(parameter).all() for parameter in master)


def test_the_learning_rate_of_each_update_is_the_one_in_its_record(
    whole: Path, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    def update_and_note(engine: Any, *, learning_rate: float) -> torch.Tensor:
        skipped = update(engine, learning_rate=learning_rate)
        rates.extend({group["lr"] for group in engine.optimizer.param_groups})
        return skipped

    update = loop.update
    monkeypatch.setattr(loop, "update", update_and_note)
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", tmp_path / "run")
    assert train_here(*call).exit_code == 0
    assert rates == [record["learning_rate"] for record in records(whole)]
