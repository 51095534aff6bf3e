"""A pool of workers of which one dies ends with the error alone, however its threads take turns."""

import contextlib
import os
import signal
import threading
import time
from concurrent.futures import BrokenExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest

from prep.store.process_pool import WorkerPool


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_dead_worker_breaks_no_thread_of_the_pool(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", broken.append)
    close = Connection._close  # type: ignore[attr-defined]

    def slowly(connection: Connection, *arguments: Any) -> None:
        time.sleep(seconds)  # whoever else wants to close it has the time to
        close(connection, *arguments)

    monkeypatch.setattr(Connection, "_close", slowly)
    with contextlib.suppress(BrokenExecutor), WorkerPool(2, int) as pool:
        worker = pool.submit(os.getpid).result()
        waiting = [pool.submit(time.sleep, 60) for _ in range(4)]
        os.kill(worker, signal.SIGKILL)
        for future in waiting:
            future.result()
    assert broken == []
    assert all(future.done() for future in waiting)
