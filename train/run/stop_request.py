"""A request to stop, by signal or by file: noted at once, honoured after the step, with a save.

SIGTERM, SIGUSR1 and a first Ctrl-C (SIGINT) ask for a stop; a second Ctrl-C ends the process at
once, unsaved. `touch RUN/STOP` asks for one too, on any machine that sees the run directory; the
file is removed once the run has stopped.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from train.engine.launcher_env import launched, read_launcher_env

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SignalHandler = Callable[[int, FrameType | None], None]
CTRL_C_LINE = "Ctrl-C: the run stops after this step, and saves; again ends it at once\n"


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self, file: Path) -> None:
        self.signal_name: str | None = None
        # One rank looks at the directory, and tells the others.
        self._file = file if not launched() or read_launcher_env().rank == 0 else None

    def is_set(self) -> bool:
        """Return whether a signal has come or the file exists: one look at the directory."""
        return self.signal_name is not None or (self._file is not None and self._file.exists())

    def clear(self) -> None:
        """Remove the file, so that the next start trains on."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            # The default handler also ends a wait in native code, which a Python one could not.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # Not through logging: the signal may have come while it held its lock.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, CTRL_C_LINE.encode())


@contextlib.contextmanager
def watching_signals(file: Path) -> Iterator[StopRequest]:
    """Note what asks for a stop while the block runs; afterwards signals act as before."""
    stop_request = StopRequest(file)
    with signal_handlers(dict.fromkeys(STOP_SIGNALS, stop_request.note)):
        yield stop_request


@contextlib.contextmanager
def signal_handlers(handlers: Mapping[signal.Signals, SignalHandler]) -> Iterator[None]:
    """Install `handlers` while the block runs; afterwards signals act as before."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
