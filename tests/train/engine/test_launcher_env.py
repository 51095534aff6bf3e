"""The variables of a launcher: read as they are, set for one process, and restored."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.engine.launcher_env import LauncherEnv, launched, read_launcher_env, single_process_env

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@settings(deadline=None, max_examples=40)
@given(before=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 9999).map(str)))
def test_the_environment_is_restored_whatever_it_was(before: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.delenv(name, raising=False)
        for name, value in before.items():
            patch.setenv(name, value)
        outside = dict(os.environ)
        inside = []
        with contextlib.suppress(KeyError), single_process_env():
            inside.append((launched(), read_launcher_env(), os.environ["MASTER_ADDR"]))
            raise KeyError
        assert inside == [(True, LauncherEnv(rank=0, local_rank=0, world_size=1), "127.0.0.1")]
        assert dict(os.environ) == outside
        assert launched() == ("RANK" in before)


@settings(deadline=None, max_examples=40)
@given(rank=st.integers(0, 999), local_rank=st.integers(0, 7), world_size=st.integers(1, 1000))
def test_a_rank_is_read_as_its_launcher_set_it(rank: int, local_rank: int, world_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("LOCAL_RANK", str(local_rank))
        patch.setenv("WORLD_SIZE", str(world_size))
        expected = LauncherEnv(rank=rank, local_rank=local_rank, world_size=world_size)
        assert read_launcher_env() == expected


CHILD = """
import os, signal, sys, time
from train.engine.launcher_env import die_with_parent
die_with_parent()
print(os.getpid(), flush=True)
signal.pause()
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can bind a process to its parent")
def test_a_rank_dies_with_a_launcher_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        launcher.send_signal(signal.SIGKILL)
        # The pipe closes once both processes are gone: without die_with_parent this hangs.
        try:
            launcher.communicate(timeout=30)
        finally:
            if os.path.exists(f"/proc/{rank}"):  # noqa: PTH110
                os.kill(rank, signal.SIGKILL)
    assert launcher.returncode == -signal.SIGKILL
