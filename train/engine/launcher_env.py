"""The rank of this process, from the variables of its launcher. No other file reads or sets them.

A single process needs no launcher: it is rank 0 of 1. Several processes come from torchrun, which
sets the variables.
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
    """Return what the launcher set; rank 0 of 1 without one."""
    return LauncherEnv(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
    )


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies.

    torchrun starts each rank in a new session: if the launcher were killed, the ranks would train
    on unseen and keep the lock of the run.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def single_process_env() -> Iterator[None]:
    """Set the variables that torch and DeepSpeed read for a process group of one, while the block
    runs."""
    # The kernel chooses a free port.
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
