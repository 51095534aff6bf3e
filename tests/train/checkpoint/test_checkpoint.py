"""Checkpoints on disk: which ones stay, which are refused, and with what message."""

import json
import shutil
from pathlib import Path

import pytest
from train_runs import losses, records, status, train_here, write_inputs

from train.run.checkpoint_layout import list_checkpoints, read_state_file


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Shard set, recipe, and a run stopped after step 5 with the checkpoints of steps 4 and 5."""
    folder = tmp_path_factory.mktemp("stopped")
    shards, recipe = write_inputs(folder)
    run = folder / "run"
    assert (
        train_here(
            "--shards", shards, "--recipe", recipe, "--output", run, "--stop-after", 5
        ).exit_code
        == 75
    )
    return shards, recipe, run


@pytest.fixture
def again(stopped: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, tuple[object, ...]]:
    """A copy of that run, and the command that resumes it."""
    shards, recipe, run = stopped
    copy = shutil.copytree(run, tmp_path / "run")
    return copy, ("--shards", shards, "--recipe", recipe, "--output", copy, "--stop-after", 1, "-q")


def test_the_last_two_stay_and_hold_all_files_that_an_export_needs(
    stopped: tuple[Path, Path, Path],
) -> None:
    run = stopped[2]
    checkpoints = list_checkpoints(run / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000004", "step-00000005"]
    newest = checkpoints[-1]
    state = read_state_file(newest)
    assert state["step"] == 5
    files = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert files == {*state["files"], "state.json"}
    assert {"run.json", "model/config.json", "rng/rank-00000.safetensors"} < files
    assert json.loads((newest / "run.json").read_text()) == json.loads(
        (run / "config.json").read_text()
    )


def test_leftovers_of_a_dead_writer_are_ignored_and_removed(
    again: tuple[Path, tuple[object, ...]],
) -> None:
    run, call = again
    torn = run / "checkpoints" / ".tmp-step-00000006"
    (torn / "engine").mkdir(parents=True)
    (torn / "engine" / "half").write_bytes(b"x")
    assert train_here(*call).exit_code == 75
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-00000005",
        "step-00000006",
    ]


def damage(run: Path, kind: str) -> None:
    newest = run / "checkpoints" / "step-00000005"
    state = next((newest / "engine" / "state").glob("*model_states.pt"))
    match kind:
        case "flipped byte":
            data = bytearray(state.read_bytes())
            data[len(data) // 2] ^= 1
            state.write_bytes(data)
        case "truncated":
            state.write_bytes(state.read_bytes()[:-1])
        case "missing":
            state.unlink()
        case "no state.json":
            (newest / "state.json").unlink()
        case "other version":
            content = json.loads((newest / "state.json").read_text())
            (newest / "state.json").write_text(json.dumps({**content, "format_version": 99}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flipped byte", "its bytes have changed since it was written"),
        ("truncated", "state.json expects"),
        ("missing", "is missing"),
        ("no state.json", "is not a whole checkpoint"),
        ("other version", "format_version is 99; this program reads 2"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_older_one_offered(
    kind: str, message: str, again: tuple[Path, tuple[object, ...]]
) -> None:
    run, call = again
    damage(run, kind)
    result = train_here(*call)
    assert result.exit_code == 5
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    older = run / "checkpoints" / "step-00000004"
    assert f"resume from the one before it with --resume {older}" in result.stderr
    assert train_here(*call, "--resume", older).exit_code == 75
    assert "after step 5 of 8" in status(run)["message"]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step-00000004", "step-00000005", "superseded"}
    assert [path.name for path in (run / "checkpoints" / "superseded").iterdir()] == [
        "step-00000005"
    ]


def test_a_run_that_resumes_from_an_older_checkpoint_continues_from_there(
    again: tuple[Path, tuple[object, ...]], stopped: tuple[Path, Path, Path]
) -> None:
    run, call = again
    done = train_here(*call, "--resume", run / "checkpoints" / "step-00000004", "-v")
    assert done.exit_code == 75
    assert "moved step-00000005 to" in done.stderr
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5]
    assert losses(run) == losses(stopped[2])
    assert train_here(*call).exit_code == 75
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_run_needs_trust_and_starts_a_new_run(
    stopped: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    shards, recipe, run = stopped
    foreign, branch = run / "checkpoints" / "step-00000004", tmp_path / "branch"
    call = ("--shards", shards, "--recipe", recipe, "--output", branch, "--resume", foreign)
    refused = train_here(*call)
    assert refused.exit_code == 5
    assert "DeepSpeed's files can run code" in refused.stderr
    assert "--trust-checkpoint" in refused.stderr
    before = {path: path.read_bytes() for path in foreign.rglob("*") if path.is_file()}
    trusted = (*call, "--trust-checkpoint")
    assert train_here(*trusted, "--stop-after", 1).exit_code == 75
    assert losses(branch) == losses(run)[4:5]
    again = train_here(*trusted)
    assert again.exit_code == 5
    assert (
        "has checkpoints already; leave --resume out to resume from step-00000005" in again.stderr
    )
    other = train_here(
        *call[:4], "--output", tmp_path / "other", *trusted[6:], "--set", "optim.learning_rate=1"
    )
    assert other.exit_code == 3
    assert "was begun with optim.learning_rate" in other.stderr
    assert {path: path.read_bytes() for path in foreign.rglob("*") if path.is_file()} == before


def test_the_newest_complete_checkpoint_is_never_removed(
    again: tuple[Path, tuple[object, ...]],
) -> None:
    """Even with keep_last = 1, and after a crash between a rename and a removal."""
    run, call = again
    (run / "checkpoints" / ".tmp-step-00000003-old").mkdir()
    for step in (6, 7):
        assert train_here(*call, "--set", "checkpoint.keep_last=1").exit_code == 75
        assert [path.name for path in list_checkpoints(run / "checkpoints")] == [f"step-{step:08d}"]
    assert not (run / "checkpoints" / ".tmp-step-00000003-old").exists()


def test_a_failed_save_loses_nothing(
    again: tuple[Path, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk is full during a save, the older checkpoints stay, and the next call resumes from
    them."""
    run, call = again

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("train.checkpoint.checkpoint.save_file", full)
        stopped = train_here(*call)
    assert stopped.exit_code == 6
    assert "No space left" in stopped.stderr
    assert status(run)["state"] == "failed"
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["step-00000004", "step-00000005"]
    assert train_here(*call).exit_code == 75
    assert [path.name for path in (run / "checkpoints").glob(".tmp-*")] == []
