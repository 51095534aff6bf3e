"""Worker processes that end with this one, however it ends. An interrupt is left to the parent.

A pool of the standard library outlives a parent that is killed: its workers hold both ends of their
queue and wait for ever, each with a tokenizer in memory. Here every worker watches a pipe whose
other end only the parent holds.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")


class WorkerPool:
    """`workers` fresh interpreters that call `prepare(*arguments)` first; each starts when there is
    work for it."""

    def __init__(self, workers: int, prepare: Callable[..., None], *arguments: Any) -> None:
        # a fork would inherit the threads and locks of the tokenizer libraries
        context = multiprocessing.get_context("spawn")
        self._watched, self._leash = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=context,
            initializer=_start,
            initargs=(self._watched, prepare, arguments),
        )

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._leash.close()  # an interrupt does not wait for the work under way
        # With its workers dead, a write to the queue of tasks waits for ever, because we hold its
        # reading end too. Python closes that end since 3.11.5; before, shutdown hangs (cpython
        # issue 94777). A thread of the pool may close the descriptor at this moment, so it is not
        # closed here but pointed at /dev/null.
        queue = self._pool._call_queue  # type: ignore[attr-defined]
        if kind is not None and sys.version_info < (3, 11, 5) and queue is not None:
            with Path(os.devnull).open("rb") as nothing, contextlib.suppress(OSError):
                os.dup2(nothing.fileno(), queue._reader.fileno())
        self._pool.shutdown(cancel_futures=True)
        self._leash.close()
        self._watched.close()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Call `function` in a worker. If the worker dies, the future raises BrokenExecutor; this
        never does."""
        # A process that this starts inherits the mask: Ctrl-C does not reach it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        try:
            return self._pool.submit(function, *arguments)
        except BrokenExecutor as exc:
            failed: Future[Result] = Future()
            failed.set_exception(exc)
            return failed
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(watched: Connection, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
    prepare(*arguments)


def _end_with_parent(watched: Connection) -> None:
    watched.poll(None)  # nothing is ever sent: readable means closed
    os._exit(1)
