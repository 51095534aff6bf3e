"""A disk that fills up during a save is reported in one line; nothing is lost, and the same command
resumes."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from train_runs import losses, status, train_apart, train_here, write_inputs

from train.run.checkpoint_layout import list_checkpoints

# Ranks draw dropout from different generators.
NO_DROPOUT = ("--set", "model.config.attention_dropout=0.0")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True
    )
    if mounting.returncode:
        pytest.skip("a full disk needs the right to mount a small file system (root)")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path, *, leaving: int) -> None:
    """Write a file that leaves so many bytes free."""
    (disk / "filler").unlink(missing_ok=True)
    system = os.statvfs(disk)
    with (disk / "filler").open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, system.f_bavail * system.f_bsize - leaving)


@pytest.fixture(scope="module")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose disk has room."""
    run = tmp_path_factory.mktemp("whole") / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run, *NO_DROPOUT)
    assert train_here(*call).exit_code == 0
    return run


def assert_nothing_is_lost(run: Path) -> None:
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["step-00000002", "step-00000004"]


def assert_whole(run: Path, whole: Path) -> None:
    assert status(run)["state"] == "complete"
    assert list((run / "checkpoints").glob(".tmp-*")) == []
    for (step, loss), (other, expected) in zip(losses(run), losses(whole), strict=True):
        assert step == other
        assert loss == pytest.approx(expected, rel=1e-5)


# Nothing can be written at all, or a part of a checkpoint can.
@pytest.mark.parametrize("leaving", [0, 40_960])
def test_a_disk_that_is_full_when_a_checkpoint_is_saved(
    leaving: int, inputs: tuple[Path, Path], whole: Path, disk: Path
) -> None:
    """torch reports "unexpected pos" and safetensors "code: 28"; the run reports the system's error
    for both."""
    run = disk / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run, *NO_DROPOUT)
    assert train_here(*call, "--stop-after", 4).exit_code == 75
    fill(disk, leaving=leaving)
    failed = train_here(*call)
    assert failed.exit_code == 6
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "No space left on device; free some space" in failed.stderr.splitlines()[-1]
    assert_nothing_is_lost(run)
    if leaving:
        assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 6)
    (disk / "filler").unlink()
    assert train_here(*call).exit_code == 0
    assert_whole(run, whole)


@pytest.mark.slow
def test_two_ranks_whose_disk_is_full(inputs: tuple[Path, Path], whole: Path, disk: Path) -> None:
    run = disk / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run, *NO_DROPOUT)
    call += ("--nproc-per-node", 2)
    assert train_apart(*call, "--stop-after", 4).returncode == 75
    fill(disk, leaving=0)
    failed = train_apart(*call)
    assert failed.returncode == 6
    # Before any rank is started.
    assert failed.stderr.startswith("error: ")
    fill(disk, leaving=40_960)
    failed = train_apart(*call)
    assert failed.returncode == 6, failed.stderr
    assert "No space left on device; free some space" in failed.stderr.splitlines()[-1]
    assert_nothing_is_lost(run)
    (disk / "filler").unlink()
    done = train_apart(*call)
    assert done.returncode == 0, done.stderr
    assert_whole(run, whole)


def test_a_disk_that_is_full_when_a_model_is_exported(whole: Path, disk: Path) -> None:
    fill(disk, leaving=40_960)
    failed = train_here("export", whole / "checkpoints" / "step-00000006", disk / "model")
    assert failed.exit_code == 6
    assert "No space left on device; free some space" in failed.stderr
    assert [path.name for path in disk.iterdir()] == ["filler"]
