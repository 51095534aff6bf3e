"""Checkpoints are pushed while training goes on and waits for nothing; what a fault prevented is
pushed at the end."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_state import TOKEN, Hub
from train_runs import losses, records, status, train_here, weights, write_inputs
from writable_hub import serve_hub

SFT_TRAIN = Path(sys.executable).with_name("sft-train")
REPO = "user/tiny"
STEPS = 9  # checkpoints after 2, 4, 6, 8 and 9; the last two are kept


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_packs=40)


@pytest.fixture(scope="module")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that pushes nothing."""
    run = tmp_path_factory.mktemp("whole") / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run, "--max-steps", STEPS)
    assert train_here(*call).exit_code == 0
    return run


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as served:
        yield served


def environment(hub: Hub, run: Path) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return inherited | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(run.with_name("home")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


def start(
    hub: Hub, inputs: tuple[Path, Path], run: Path, *more: object, repo: str = REPO
) -> "subprocess.Popen[str]":
    """In a process group of its own, as a shell gives it."""
    words: list[object] = [SFT_TRAIN, "--shards", inputs[0], "--recipe", inputs[1], "--output", run]
    words += ["--max-steps", STEPS, "--push-checkpoints", repo, *more]
    return subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(hub, run), process_group=0,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    stderr = process.communicate(timeout=200)[1]
    return process.returncode, stderr


def wait_until(has_come: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not has_come():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def held(hub: Hub, branch: str) -> dict[str, bytes]:
    return {
        name: blob.data
        for name, blob in hub.repositories[REPO].files(branch).items()
        if name != ".gitattributes"
    }


def local(checkpoint: Path) -> dict[str, bytes]:
    return {
        path.relative_to(checkpoint).as_posix(): path.read_bytes()
        for path in checkpoint.rglob("*")
        if path.is_file()
    }


def assert_on_hub(hub: Hub, run: Path) -> None:
    """Every checkpoint that the run has left is on the hub, byte for byte, and nothing is where the
    model would be."""
    names = sorted(path.name for path in run.glob("checkpoints/step-*"))
    assert names == ["step-00000008", "step-00000009"]
    for name in names:
        assert held(hub, f"run-{name}") == local(run / "checkpoints" / name)
    assert held(hub, "main") == {}
    assert hub.repositories[REPO].private


@pytest.mark.slow
def test_a_slow_hub_does_not_delay_training_and_the_checkpoint_in_transfer_stays(
    hub: Hub, inputs: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = hub.fail("/commit/run-step-00000002", "hold")
    process = start(hub, inputs, run)
    # all steps are done
    wait_until(lambda: fault.reached.is_set() and (run / "model").exists(), process)
    assert (run / "checkpoints" / "step-00000002").is_dir()
    assert not (run / "checkpoints" / "step-00000004").exists()
    assert status(run)["state"] == "running"
    fault.released.set()
    code, stderr = ended(process)
    assert code == 0, stderr
    assert "step-00000004 is not pushed yet, for step-00000002 still is" in stderr
    assert_on_hub(hub, run)
    assert set(held(hub, "run-step-00000002")) == set(local(run / "checkpoints" / "step-00000008"))
    assert losses(run) == losses(whole)
    assert status(run)["state"] == "complete"
    # the same command finds all of it there: no blob is sent, no commit made
    writes = len(hub.writes())
    assert ended(start(hub, inputs, run))[0] == 0
    assert [line for line in hub.writes()[writes:] if "/commit/" in line or "/lfs/" in line] == []


@pytest.mark.slow
def test_a_push_that_fails_stops_no_step_and_is_repeated_at_the_end(
    hub: Hub, inputs: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    hub.fail("POST /api/models/user/tiny/commit/run-step-0000000", "403", times=1)
    code, stderr = ended(start(hub, inputs, run))
    assert code == 0, stderr
    assert "the hub answered 403" in stderr
    assert "was not pushed (see above); training goes on" in stderr
    assert_on_hub(hub, run)
    assert losses(run) == losses(whole)


@pytest.mark.slow
def test_a_hub_that_refuses_everything_costs_no_step_and_the_same_command_resumes(
    hub: Hub, inputs: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = hub.fail("/commit/", "403", times=1000)
    code, stderr = ended(start(hub, inputs, run))
    assert code == 6
    assert "error: cannot push to user/tiny: the hub answered 403" in stderr
    assert (
        f"error: the run has trained, but `sft-train push --checkpoints {run} {REPO}` failed"
        in stderr
    )
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 6)
    assert losses(run) == losses(whole)
    fault.times = 0
    code, stderr = ended(start(hub, inputs, run))
    assert code == 0, stderr
    assert_on_hub(hub, run)
    for name, tensor in weights(whole).items():
        assert tensor.equal(weights(run)[name])


@pytest.mark.slow
def test_a_stop_does_not_wait_for_the_hub_and_a_pushed_checkpoint_can_be_resumed_from(
    hub: Hub, inputs: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    """Then the directory of the run is lost: a checkpoint that is fetched from the hub is
    enough."""
    run = tmp_path / "run"
    fault = hub.fail("/commit/run-step-00000002", "hold")
    code, stderr = ended(start(hub, inputs, run, "--stop-after", 5))
    assert code == 75
    assert not fault.released.is_set()
    assert "a push is cut short; the same command resumes it" in stderr
    fault.released.set()
    code, stderr = ended(start(hub, inputs, run))
    assert code == 0, stderr
    fetched = held(hub, "run-step-00000005")  # what the second call resumed from
    shutil.rmtree(run)
    for name, data in fetched.items():
        file = run / "checkpoints" / "step-00000005" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run, "--max-steps", STEPS)
    refused = train_here(*call)  # it holds pickles, which nobody wrote here
    assert refused.exit_code == 5
    assert "they were not written there" in refused.stderr
    other = train_here(*call, "--trust-checkpoint", "--set", "optim.learning_rate=1.0")
    assert other.exit_code == 3
    assert "optim.learning_rate" in other.stderr
    done = train_here(*call, "--trust-checkpoint")
    assert done.exit_code == 0, done.output
    assert losses(run) == losses(whole)[5:]


@pytest.mark.slow
def test_two_ranks_push_too(hub: Hub, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, stderr = ended(start(hub, inputs, run, "--nproc-per-node", 2))
    assert code == 0, stderr
    assert_on_hub(hub, run)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_ctrl_c_ends_the_last_pushes_too(
    num_ranks: int, hub: Hub, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """All is trained and exported; the terminal sends the signal to every process of the
    command."""
    run = tmp_path / "run"
    fault = hub.fail("/commit/", "hold")
    ranks = ("--nproc-per-node", num_ranks)
    process = start(hub, inputs, run, *ranks)
    wait_until(lambda: fault.reached.is_set() and (run / "model").exists(), process)
    os.killpg(process.pid, signal.SIGINT)
    code, stderr = ended(process)
    assert code == 75, stderr
    assert not fault.released.is_set()
    assert "stopped while pushing, all steps done; run the same command again to resume" in stderr
    assert "was not pushed" not in stderr  # the signal is for the run, which ends the push itself
    assert (status(run)["state"], status(run)["exit_code"]) == ("stopped", 75)
    fault.released.set()
    code, stderr = ended(start(hub, inputs, run, *ranks))
    assert code == 0, stderr
    assert_on_hub(hub, run)


def pushes_of(run: Path) -> list[str]:
    """Return the processes that push something of `run`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "push" in words and any(word.startswith(str(run)) for word in words):
                found.append(folder.name)
    return found


@pytest.mark.slow
def test_a_killed_run_takes_its_push_along(
    hub: Hub, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = hub.fail("/commit/", "hold")
    process = start(hub, inputs, run)
    wait_until(fault.reached.is_set, process)
    assert len(pushes_of(run)) == 1
    process.kill()
    # it ends when nobody holds the pipes any more; the hub would hold them for a minute
    process.communicate(timeout=40)
    deadline = time.monotonic() + 30
    while pushes_of(run):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not fault.released.is_set()


@pytest.mark.slow
def test_the_evaluation_loss_is_pushed_too_and_best_under_the_name_of_its_step(
    hub: Hub, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, stderr = ended(start(hub, inputs, run, "--eval-shards", inputs[0]))
    assert code == 0, stderr
    first = json.loads(held(hub, "run-step-00000002")["state.json"])
    assert first["eval_loss"] == pytest.approx(
        next(
            record["eval_loss"]
            for record in records(run)
            if "eval_loss" in record and record["step"] == 2
        )
    )
    done = subprocess.run(
        [SFT_TRAIN, "push", run / "checkpoints" / "best", REPO],
        env=environment(hub, run),
        capture_output=True,
        text=True,
        check=True,
    )
    best = (run / "checkpoints" / "best").resolve().name
    assert done.stdout == f"{hub.endpoint}/{REPO}/tree/run-{best}\n"


@pytest.mark.parametrize(
    ("repo", "token", "code"), [("a/b/c", TOKEN, 3), (REPO, "hf_of_nobody", 6)]
)
def test_a_repository_that_refuses_the_run_is_an_error_before_the_first_step(
    repo: str, token: str, code: int, hub: Hub, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    hub.token = token
    run = tmp_path / "run"
    exit_code, stderr = ended(start(hub, inputs, run, repo=repo))
    assert exit_code == code, stderr
    assert "the hub answered 401; log in" in stderr or "expected user/name" in stderr
    assert not (run / "metrics.jsonl").exists()
