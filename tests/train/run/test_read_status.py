"""How a run ended is read from status.json, not from the exit code that torchrun makes of it."""

import os
import threading
from pathlib import Path

import pytest
from train_runs import write_inputs

from shared.errors import ArtifactError, ConfigError, DataError, SftError, StoppedOnRequest
from train.run.directory import RunDir, State, write_status
from train.run.prepare import Prepared, TrainRequest, prepare
from train.run.read_status import (
    error_of,
    last_change,
    raise_unless_complete,
    read_outcome,
    status_since,
)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    shards, recipe = write_inputs(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    return prepare(TrainRequest(shards=shards, recipe=str(recipe), output=run))


def test_every_exit_code_of_a_rank_becomes_its_error_again() -> None:
    for code in (3, 4, 5, 6, 75):
        assert error_of(code).exit_code == code
    assert error_of(5) is ArtifactError
    assert error_of(75) is StoppedOnRequest
    assert error_of(1) is error_of(-9) is error_of(None) is SftError


@pytest.mark.parametrize(
    ("state", "code", "line"),
    [
        ("complete", 0, "is complete: trained"),
        ("stopped", 75, "has stopped: trained"),
        ("failed", 4, "has failed: trained"),
    ],
)
def test_a_run_that_has_ended_gives_its_exit_code(
    state: State, code: int, line: str, tmp_path: Path
) -> None:
    write_status(RunDir(tmp_path), state, exit_code=code, message="trained 8 steps")
    assert read_outcome(RunDir(tmp_path)) == (code, f"{tmp_path} {line} 8 steps")


def test_a_run_whose_ranks_recorded_no_end_was_killed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(ArtifactError, match=r"has no status\.json"):
        read_outcome(run)
    write_status(run, "running", exit_code=None, message="")
    code, line = read_outcome(run)
    assert code == 1
    assert "is running, or was killed" in line


@pytest.mark.parametrize("state", ["stopped", "failed", "running"])
def test_a_status_older_than_the_start_is_not_its_outcome(state: State, tmp_path: Path) -> None:
    run, mark = RunDir(tmp_path), tmp_path / "started"
    code = None if state == "running" else 75
    write_status(run, state, exit_code=code, message="before")
    mark.touch()
    os.utime(mark, ns=(0, run.status.stat().st_mtime_ns + 1))
    outcome, line = read_outcome(run, changed_after=mark)
    assert outcome == 1
    assert f"ended before its ranks began; their logs hold the reason. Before that: {state}" in line


def test_a_complete_run_stays_complete_for_later_starts(tmp_path: Path) -> None:
    run, mark = RunDir(tmp_path), tmp_path / "started"
    write_status(run, "complete", exit_code=0, message="done")
    mark.touch()
    os.utime(mark, ns=(0, run.status.stat().st_mtime_ns + 1))
    assert read_outcome(run, changed_after=mark)[0] == 0


def test_a_status_that_shows_up_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.run.read_status._SECONDS_BETWEEN_LOOKS", 0.01)
    run = RunDir(tmp_path)
    write_status(run, "running", exit_code=None, message="")
    late = threading.Timer(
        0.1, write_status, (run, "failed"), {"exit_code": 4, "message": "a bad pack"}
    )
    late.start()
    assert read_outcome(run, wait_seconds=60) == (4, f"{tmp_path} has failed: a bad pack")
    late.join()


def test_the_error_in_a_new_status_is_raised_again(prepared: Prepared) -> None:
    """torchrun's exit code is 1, or that of the rank that failed first."""
    before = last_change(prepared.run)
    write_status(prepared.run, "failed", exit_code=4, message="a bad pack")
    for code in (1, 4):
        with pytest.raises(DataError, match="a bad pack"):
            raise_unless_complete(prepared, exit_code=code, before=before, message="see above")


def test_a_stop_is_raised_although_torchrun_ended_well(prepared: Prepared) -> None:
    write_status(prepared.run, "stopped", exit_code=75, message="stopped after step 3")
    with pytest.raises(StoppedOnRequest, match="after step 3"):
        raise_unless_complete(prepared, exit_code=0, before=None, message="see above")


def test_a_run_that_completed_raises_nothing(prepared: Prepared) -> None:
    raise_unless_complete(prepared, exit_code=0, before=None, message="see above")
    write_status(prepared.run, "complete", exit_code=0, message="done")
    raise_unless_complete(prepared, exit_code=0, before=None, message="see above")


def test_ranks_that_were_refused_the_run_do_not_end_as_the_start_that_holds_it(
    prepared: Prepared,
) -> None:
    write_status(prepared.run, "failed", exit_code=4, message="of the other start")
    before = last_change(prepared.run)
    assert status_since(prepared.run, before) is None
    with pytest.raises(ArtifactError, match="see above"):
        raise_unless_complete(prepared, exit_code=5, before=before, message="see above")
    with pytest.raises(ConfigError, match="see above"):
        raise_unless_complete(prepared, exit_code=3, before=None, message="see above")


@pytest.mark.parametrize("status", [None, "running"])
def test_killed_ranks_are_explained_by_a_shard_file_that_was_cut_short(
    status: State | None, prepared: Prepared
) -> None:
    if status is not None:
        write_status(prepared.run, status, exit_code=None, message="")
    with pytest.raises(SftError, match="see above"):
        raise_unless_complete(prepared, exit_code=1, before=None, message="see above")
    os.truncate(prepared.shard_set.path / "shards" / "00000" / "tokens.npy", 128)
    with pytest.raises(ArtifactError, match=r"tokens\.npy was changed while it was in use"):
        raise_unless_complete(prepared, exit_code=1, before=None, message="see above")
