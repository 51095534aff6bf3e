"""Worker processes that end with this one, however it ends; an interrupt is the parent's business
alone.

A pool of the standard library outlives a parent that is killed: its workers hold both ends of their
queue and wait for ever, with a tokenizer each. Here every worker watches a pipe of which only the
parent holds the other end.
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
    """`workers` fresh interpreters, each prepared by `prepare(*arguments)`, started as work comes
    in."""

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
        if kind is not None:
            _unblock(self._pool)
        self._pool.shutdown(cancel_futures=True)
        self._leash.close()
        self._watched.close()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Call `function` in a worker. A worker that died shows as BrokenExecutor in the future,
        never here."""
        before = signal.pthread_sigmask(
            signal.SIG_BLOCK, (signal.SIGINT,)
        )  # inherited by a process that this starts
        try:
            return self._pool.submit(function, *arguments)
        except BrokenExecutor as exc:
            failed: Future[Result] = Future()
            failed.set_exception(exc)
            return failed
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unblock(pool: ProcessPoolExecutor) -> None:
    """Let go of our end of the queue of tasks: with its workers dead, a write to it would wait for
    us to read.

    Python before 3.11.5 hangs at shutdown then (cpython issue 94777); later ones close it
    themselves. A thread of the pool closes the descriptor at the same time, so it is not closed
    here but pointed at nothing.
    """
    queue = pool._call_queue  # type: ignore[attr-defined]
    if sys.version_info < (3, 11, 5) and queue is not None:
        with (
            Path(os.devnull).open("rb") as nothing,
            contextlib.suppress(OSError),
        ):  # it may be closed already
            os.dup2(nothing.fileno(), queue._reader.fileno())


def _start(watched: Connection, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
    prepare(*arguments)


def _end_with_parent(watched: Connection) -> None:
    watched.poll(None)  # nothing is ever sent: readable means closed
    os._exit(1)
