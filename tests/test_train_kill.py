"""Killed with SIGKILL and started again by the same command: the losses and weights of an undisturbed run."""

import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from train_runs import command, losses, status, train_apart, train_here, weights, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def kill_when(run: Path, reached: str, *arguments: object) -> None:
    """Start `sft-train`, wait for a path in the run directory, kill it; ranks of torchrun must die with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(*arguments), env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list(run.glob(reached)) and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        assert list(run.glob(reached))
    finally:
        process.kill()
        process.wait()
    with (run / ".lock").open("r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # waits for ranks that are still dying


def assert_same_run(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    assert [path.name for path in run.glob("checkpoints/.tmp-*")] == []
    expected, found = weights(whole), weights(run)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "reached", ["checkpoints/step-00000002", "checkpoints/.tmp-step-00000004/engine", "checkpoints/step-00000008"]
)
def test_a_killed_run_goes_on_as_if_undisturbed(reached: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Between steps, inside the write of a checkpoint, and between the last step and the export."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output")
    assert train_here(*call, whole).exit_code == 0
    kill_when(run, reached, *call, run)
    assert status(run)["state"] == "running"
    assert not (run / "model").exists()
    assert train_here(*call, run).exit_code == 0
    assert_same_run(run, whole)


NO_DROPOUT = ("--set", "model.config.attention_dropout=0.0")  # ranks draw from different generators


@pytest.fixture(scope="module")
def two_ranks(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on two ranks."""
    run = tmp_path_factory.mktemp("two") / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--nproc-per-node", 2, "--output", run, *NO_DROPOUT)
    done = train_apart(*call)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run / 'model'}\n"
    return run


@pytest.mark.slow
def test_two_killed_ranks_go_on_as_if_undisturbed(two_ranks: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--nproc-per-node", 2, "--output", run, *NO_DROPOUT)
    kill_when(run, "checkpoints/.tmp-step-00000004/engine", *call)
    assert status(run)["state"] == "running"
    assert train_apart(*call).returncode == 0
    assert_same_run(run, two_ranks)


@pytest.mark.slow
def test_one_rank_and_two_ranks_log_the_same_losses(two_ranks: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "one"
    assert train_here("--shards", inputs[0], "--recipe", inputs[1], "--output", run, *NO_DROPOUT).exit_code == 0
    for (step, one), (other, two) in zip(losses(run), losses(two_ranks), strict=True):
        assert step == other
        assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_sigterm_to_the_launcher_stops_all_ranks_after_a_save(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("--shards", inputs[0], "--recipe", inputs[1], "--nproc-per-node", 2, "--output", run)
    process = subprocess.Popen(
        command(*arguments, "--max-steps", 5000), env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert status(run)["state"] == "stopped"
    assert errors.rstrip().split("\n")[-1].startswith("stopped after step")
