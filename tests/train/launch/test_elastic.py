"""torchrun without its tracebacks: the exit code is that of the rank that failed first."""

import subprocess
import sys

import pytest

# A script for both ranks, and what comes of it. torchrun reads $$ as an escaped $.
KILL_RANK_1 = '[ "$RANK" = 0 ] && sleep 60; kill -KILL $$$$'
CASES = {
    "all end well": ("exit 0", 0, ""),
    "one fails": ('[ "$RANK" = 0 ] && sleep 60; exit 4', 4, ""),
    "one is killed": (KILL_RANK_1, 1, "rank 1 was killed by SIGKILL\n"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_exit_code_is_that_of_the_rank_that_failed_first(name: str) -> None:
    script, code, line = CASES[name]
    torchrun = [sys.executable, "-P", "-m", "train.launch.elastic", "--standalone"]
    shape = ["--nproc-per-node", "2", "--shutdown-timeout", "1", "--no-python"]
    done = subprocess.run(
        [*torchrun, *shape, "sh", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert line in done.stderr
