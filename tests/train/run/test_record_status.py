"""How a run ended is in status.json and in the last line on the terminal."""

import errno
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from killed_runs import last_step, rank_processes
from train_runs import command, status, write_inputs

from train.run.directory import RunDir, write_status
from train.run.record_status import recorded_end


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 6), (errno.EDQUOT, 6), (errno.EIO, 1)])
def test_the_status_holds_the_exit_code_of_the_command(
    number: int, code: int, tmp_path: Path
) -> None:
    """Whatever was being written: a log line, a picture."""
    run = RunDir(tmp_path)
    write_status(run, "running", exit_code=None, message="")
    with pytest.raises(OSError, match="no"), recorded_end(run):
        raise OSError(number, "no")
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("failed", code)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_two_ranks_end_in_a_few_lines(
    number: signal.Signals, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """A rank is killed, or the run is to stop: no traceback of torchrun, and a last line that tells
    what to do."""
    run = tmp_path / "run"
    words = command(
        "--shards", inputs[0], "--recipe", inputs[1], "--output", run, "--nproc-per-node", 2
    )
    process = subprocess.Popen(
        [*words, "--max-steps", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while last_step(run) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(rank_processes(process.pid)[0] if number == signal.SIGKILL else process.pid, number)
    stderr = process.communicate(timeout=120)[1]
    last = stderr.splitlines()[-1]
    # A line of torchrun's traceback.
    assert "torch/distributed/elastic/multiprocessing/errors" not in stderr
    if number == signal.SIGINT:
        assert process.returncode == 75
        assert "Traceback" not in stderr
        assert last.startswith("stopped after step ")
    else:
        assert process.returncode == 1
        assert "was killed by SIGKILL" in stderr
        assert last.startswith(
            "error: another rank is gone (killed, or out of memory?); run the same command again to"
        )
        assert status(run)["message"].startswith("another rank is gone")
