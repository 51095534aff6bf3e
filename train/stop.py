"""A wish to stop that comes as a signal: noted at once, granted at the end of the step."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopWish:
    """Whether SIGTERM or SIGUSR1 has come to this process."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


@contextlib.contextmanager
def watching_signals() -> Iterator[StopWish]:
    """Note the signals that ask for a stop while the block runs; afterwards they act as before."""
    wish = StopWish()
    before = {number: signal.signal(number, wish.note) for number in _SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
