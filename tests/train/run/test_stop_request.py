"""A stop is requested by a signal or a file, on any rank; a second Ctrl-C ends the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.run.stop_request import CTRL_C_LINE, StopRequest, watching_signals

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_signals_act_as_before_afterwards(
    number: signal.Signals, tmp_path: Path
) -> None:
    before = [signal.getsignal(other) for other in SIGNALS]
    with watching_signals(tmp_path / "STOP") as request:
        assert not request.is_set()
        os.kill(os.getpid(), number)
        assert request.is_set()
        assert request.signal_name == number.name
        request.clear()
        # No file can take a signal back.
        assert request.is_set()
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_a_file_is_a_request_until_it_is_cleared(tmp_path: Path) -> None:
    file = tmp_path / "STOP"
    request = StopRequest(file)
    assert not request.is_set()
    file.touch()
    assert request.is_set()
    request.clear()
    assert not request.is_set()
    assert not file.exists()
    request.clear()


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_looks_for_the_file_and_removes_it(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    file = tmp_path / "STOP"
    file.touch()
    request = StopRequest(file)
    assert request.is_set() == (rank == 0)
    request.clear()
    assert file.exists() == (rank == 1)


def test_a_second_ctrl_c_ends_a_process_that_no_python_code_could_leave(tmp_path: Path) -> None:
    """A loop in C stands for a collective that never ends: no Python handler gets a turn in it."""
    code = (
        "import collections, itertools, sys\n"
        "from pathlib import Path\n"
        "from train.run.stop_request import watching_signals\n"
        "with watching_signals(Path(sys.argv[1])):\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    print('stuck', flush=True)\n"
        "    collections.deque(itertools.repeat(None), maxlen=0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(tmp_path / "STOP")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == CTRL_C_LINE
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=60) == -signal.SIGINT
        finally:
            process.kill()
