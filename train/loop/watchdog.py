"""Ends a run that hangs: if no step ends for too long, each rank writes its stacks and exits.

If one rank never joins a collective, the others wait in native code that no Python exception can
interrupt. So a thread watches the clock. It pauses where long waits are normal: before the first
step ends (which may compile kernels), while a checkpoint is saved and during an evaluation. There
only the longer timeout of the process group applies.
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

# How long a rank waits before it exits: its exit makes the launcher kill the other ranks, which
# are to write their stacks first.
_SECONDS_FOR_OTHERS = 5.0


class Watchdog:
    """A thread that has to hear of a finished step every `limit_seconds`."""

    def __init__(
        self, *, limit_seconds: float, stacks: Path, on_hang: Callable[[str], None]
    ) -> None:
        """On a hang, write the stacks to the file `stacks` and call `on_hang` with the reason."""
        self._limit = limit_seconds
        self._stacks = stacks
        self._on_hang = on_hang
        # When the last step ended; None while the watch is paused.
        self._last_step: float | None = None
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
        self._last_step = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let the block take any time."""
        before, self._last_step = self._last_step, None
        try:
            yield
        finally:
            if before is not None:
                self._last_step = time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(min(self._limit / 4, 10.0)):
            last_step = self._last_step
            if last_step is None or time.monotonic() - last_step <= self._limit:
                continue
            self._stacks.parent.mkdir(exist_ok=True)
            with self._stacks.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            reason = (
                f"no step ended for {self._limit:g} s (run.hang_timeout_minutes); what each rank"
                f" was doing is in {self._stacks.parent}, and a rank without a file there was not"
                " running at all. Run the same command again to resume from the last checkpoint"
            )
            self._on_hang(reason)
            logger.error("%s", reason)
            time.sleep(min(_SECONDS_FOR_OTHERS, self._limit))
            # The main thread is stuck: an exception, or sys.exit in this thread, would end nothing.
            os._exit(1)
