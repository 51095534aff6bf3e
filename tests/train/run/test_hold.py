"""Two starts of one run, one of them paused between decision and lock, end like two starts in
sequence."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_runs import command, losses, status, train_apart, train_here, weights, write_inputs

PAUSED = """
import sys
from pathlib import Path
import shared.atomic, train.run.prepare, train.cli.main, train.loop.rank, train.launch.local
where, go = sys.argv.pop(1), Path(sys.argv.pop(1))

def pause():
    print("PAUSED", flush=True)
    go.open().read()  # a FIFO: until the other side opens and closes it

def before(module, name):
    inner = getattr(module, name)
    def outer(*arguments, **options):
        pause()
        return inner(*arguments, **options)
    setattr(module, name, outer)

def after(module, name):
    inner = getattr(module, name)
    def outer(*arguments, **options):
        result = inner(*arguments, **options)
        pause()
        return result
    setattr(module, name, outer)

if where == "decided": after(train.run.prepare, "prepare")
elif where == "joined": before(train.loop.rank, "holding_run")
elif where == "holding": before(train.loop.rank, "_train")
else: raise SystemExit(where)
train.cli.main.main()
"""


class Start:
    """`sft-train` in a process that pauses at a point until `resume`."""

    def __init__(self, folder: Path, where: str, *arguments: object) -> None:
        self.fifo = folder / f"go-{where}"
        os.mkfifo(self.fifo)
        words = [sys.executable, "-P", "-c", PAUSED, where, str(self.fifo), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "PAUSED\n", (line, self.process.communicate())

    def resume(self) -> tuple[int, str, str]:
        """Let the process run to its end; return its exit code and output."""
        self.fifo.open("w").close()
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train_here("--shards", inputs[0], "--recipe", inputs[1], "--output", run).exit_code == 0
    return run


def assert_undisturbed(run: Path, whole: Path) -> None:
    assert status(run) == {**status(whole), "message": f"trained 8 steps, model in {run / 'model'}"}
    assert losses(run) == losses(whole)
    assert not (run / "checkpoints" / "superseded").exists()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        path.name for path in (whole / "checkpoints").iterdir()
    }
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(run)[name]), name


@pytest.mark.parametrize("where", ["decided", "joined"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_start_that_decided_before_another_completed_the_run_finds_it_complete(
    where: str, begun: bool, inputs: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    if begun:
        assert train_here(*call, "--stop-after", 2).exit_code == 75
    late = Start(tmp_path, where, *call)
    assert train_here(*call).exit_code == 0
    code, out, err = late.resume()
    assert code == 0, err
    assert "is complete" in out
    assert_undisturbed(run, whole)


def test_a_start_that_decided_before_another_trained_on_resumes_where_that_stopped(
    inputs: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    assert train_here(*call, "--stop-after", 2).exit_code == 75
    late = Start(tmp_path, "decided", *call)
    assert train_here(*call, "--stop-after", 4).exit_code == 75
    code, _, err = late.resume()
    assert code == 0, err
    assert "resuming after step 6" in err
    assert_undisturbed(run, whole)


def test_the_second_start_is_refused_and_leaves_the_run_alone(
    inputs: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    first = Start(tmp_path, "holding", *call)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for ranks in ((), ("--nproc-per-node", 2)):
        second = train_apart(*call, *ranks)
        assert second.returncode == 5
        assert f"another process is training in {run}" in second.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert first.resume()[0] == 0
    assert_undisturbed(run, whole)


def test_a_start_that_would_make_another_run_there_meanwhile_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    late = Start(tmp_path, "decided", *call, "--set", "optim.learning_rate=1e-4")
    never = Start(tmp_path, "joined", *call, "--resume", "never")
    assert train_here(*call, "--stop-after", 1).exit_code == 75
    before = (run / "status.json").read_bytes()
    code, _, err = late.resume()
    assert (code, "was begun with optim.learning_rate = 0.003" in err) == (3, True)
    code, _, err = never.resume()
    assert (code, "holds a run already" in err) == (5, True)
    assert (run / "status.json").read_bytes() == before


def test_the_lock_of_a_killed_start_is_free(
    inputs: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    first = Start(tmp_path, "holding", *call)
    late = Start(tmp_path, "decided", *call)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.communicate()
    assert json.loads((run / "status.json").read_text())["state"] == "running"
    code, _, err = late.resume()
    assert code == 0, err
    assert_undisturbed(run, whole)


@pytest.mark.slow
def test_ranks_that_find_the_run_held_end_their_launcher_with_that_code(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """The launcher has looked before them, while the lock was free."""
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    first = Start(tmp_path, "holding", *call)
    words = command("--under-launcher", *call)
    torchrun = [sys.executable, "-P", "-m", "train.launch.elastic", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--no-python", *words]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=300)
    assert done.returncode == 5, done.stderr
    assert f"another process is training in {run}" in done.stderr
    assert "Traceback" not in done.stderr
    assert first.resume()[0] == 0
