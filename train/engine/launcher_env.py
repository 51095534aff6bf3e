"""Where this process stands among the ranks, as its launcher said: the only place that reads or
sets its variables.

One process needs no launcher: it is rank 0 of 1. Many come from torchrun, which sets the same
variables.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LauncherEnv:
    rank: int
    local_rank: int
    world_size: int


def launched() -> bool:
    """Return whether a launcher started this process as one of its ranks."""
    return "RANK" in os.environ


def read_launcher_env() -> LauncherEnv:
    """Return what the launcher said; rank 0 of 1 without one."""
    return LauncherEnv(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
    )


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies.

    torchrun starts ranks in sessions of their own: were the launcher killed, they would train on,
    unseen, and keep the lock of the run.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def single_process_env() -> Iterator[None]:
    """Set, while the block runs, the variables that torch and DeepSpeed look for, for a process
    group of one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    single = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    before = {name: os.environ.get(name) for name in single}
    os.environ.update(single)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
