"""Ends a run that hangs: if no step ends for long, each rank writes where it stands and exits.

A collective that one rank never joins keeps the others waiting in code that no Python exception
reaches. So a thread watches the clock. It rests where long waits are normal: before the first step
ends (which may compile), while a checkpoint is written, in the export. There the process group's
own timeout, which is longer, still holds.
"""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_SECONDS_FOR_OTHERS = (
    5.0  # to write their stacks too, before the first exit makes the launcher end them all
)


class Watchdog:
    """A thread that must hear of a finished step every `limit_seconds`."""

    def __init__(
        self, *, limit_seconds: float, stacks: Path, on_hang: Callable[[str], None]
    ) -> None:
        """Write the stacks to the file `stacks`; call `on_hang` with the reason just before the
        process exits."""
        self._limit = limit_seconds
        self._stacks = stacks
        self._on_hang = on_hang
        self._fed: float | None = None  # None: at rest
        self._end = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs; the watch begins with the first `step_ended`."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def step_ended(self) -> None:
        self._fed = time.monotonic()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Allow the block any time."""
        before, self._fed = self._fed, None
        try:
            yield
        finally:
            if before is not None:
                self._fed = time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(min(self._limit / 4, 10.0)):
            fed = self._fed
            if fed is not None and time.monotonic() - fed > self._limit:
                self._give_up()

    def _give_up(self) -> None:
        self._stacks.parent.mkdir(exist_ok=True)
        with self._stacks.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        reason = (
            f"no step ended for {self._limit:g} s (run.hang_timeout_minutes); what each rank was"
            f" doing is in {self._stacks.parent}, and a rank without a file there was not running"
            " at all. Run the same command again to go on from the last checkpoint"
        )
        self._on_hang(reason)
        logger.error("%s", reason)
        time.sleep(min(_SECONDS_FOR_OTHERS, self._limit))
        os._exit(1)
