"""A rank that stands still makes the others write their stacks and end the run; the same command
resumes."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from killed_runs import rank_processes
from train_runs import command, losses, records, status, train_apart, weights, write_inputs

# SIGINT to the launcher takes the same way, and runs by default.
FULL_FORM = [
    pytest.param(f"{name} to the launcher", marks=pytest.mark.full)
    for name in ("SIGTERM", "SIGUSR1")
]


def is_gone(*processes: int) -> bool:
    """Return whether these processes end within a minute: init may be slow to reap them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        stats = [Path(f"/proc/{process}/stat") for process in processes]
        if all(
            not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
            for stat in stats
        ):
            return True
        time.sleep(0.05)
    return False


def start_two_ranks(run: Path, *arguments: object) -> "subprocess.Popen[str]":
    """Start `sft-train` on two ranks and return once it has saved a checkpoint."""
    process = subprocess.Popen(
        command(*arguments, "--output", run, "--nproc-per-node", 2),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("then", ["end", pytest.param("resume", marks=pytest.mark.full)])
def test_a_rank_that_stands_still_ends_the_run_with_stacks_and_the_same_command_resumes(
    then: str, tmp_path: Path
) -> None:
    shards, recipe = write_inputs(tmp_path)
    still = ("--set", "model.config.attention_dropout=0.0", "--set", "checkpoint.every_steps=50")
    call = ("--shards", shards, "--recipe", recipe, "--max-steps", 150, *still)
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = start_two_ranks(run, *call, "--set", "run.hang_timeout_minutes=0.05")
    second = rank_processes(process.pid)[1]
    # Between saves: the watch is paused while a checkpoint is saved.
    while records(run)[-1]["step"] < 52:
        time.sleep(0.01)
    os.kill(second, signal.SIGSTOP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert status(run)["state"] == "failed"
    assert "no step ended for 3 s (run.hang_timeout_minutes)" in status(run)["message"]
    assert errors.rstrip().split("\n")[-1] == f"error: {status(run)['message']}"
    stacks = (run / "stacks" / "rank-0.txt").read_text()
    assert "in accumulate" in stacks or "in any_rank" in stacks or "in update" in stacks
    assert is_gone(second)
    assert records(run)[-1]["step"] < 150
    if then == "end":
        return
    assert train_apart(*call, "--output", run, "--nproc-per-node", 2).returncode == 0
    assert train_apart(*call, "--output", whole, "--nproc-per-node", 2).returncode == 0
    assert losses(run) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(run)[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("way", ["SIGTERM to rank 1", "SIGINT to the launcher", *FULL_FORM])
def test_all_ranks_save_and_stop_whoever_gets_the_signal(way: str, tmp_path: Path) -> None:
    shards, recipe = write_inputs(tmp_path)
    run = tmp_path / "run"
    process = start_two_ranks(run, "--shards", shards, "--recipe", recipe, "--max-steps", 5000)
    name, _, target = way.partition(" to ")
    pid = rank_processes(process.pid)[1] if target == "rank 1" else process.pid
    os.kill(pid, signal.Signals[name])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert status(run)["state"] == "stopped"
    assert errors.rstrip().split("\n")[-1].startswith("stopped after step")
    assert ("Ctrl-C: the run stops after this step" in errors) == (name == "SIGINT")


@pytest.mark.full
def test_a_second_ctrl_c_ends_all_ranks_at_once(tmp_path: Path) -> None:
    shards, recipe = write_inputs(tmp_path)
    run = tmp_path / "run"
    process = start_two_ranks(run, "--shards", shards, "--recipe", recipe, "--max-steps", 5000)
    ranks = rank_processes(process.pid)
    # Now no step can end.
    os.kill(ranks[1], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "Ctrl-C: the run stops after this step" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert is_gone(*ranks)


@pytest.mark.full
def test_after_ranks_were_killed_the_launcher_looks_for_a_file_that_was_truncated(
    tmp_path: Path,
) -> None:
    """Ranks that die of SIGBUS can record nothing. Here they are stopped, so that they do not
    notice the truncation first."""
    shards, recipe = write_inputs(tmp_path)
    call = ("--shards", shards, "--recipe", recipe, "--max-steps", 5000)
    process = start_two_ranks(tmp_path / "run", *call)
    ranks = rank_processes(process.pid)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    os.truncate(shards / "shards" / "00000" / "tokens.npy", 128)
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 5
    last = errors.rstrip().split("\n")[-1]
    assert "tokens.npy was changed while it was in use: it has 128 bytes" in last
