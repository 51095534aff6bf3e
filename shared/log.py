"""Logging of both commands: to stderr, on our own loggers, never on root; results go to stdout."""

import logging
import sys

_PACKAGES = ("prep", "train", "shared")


class _StderrHandler(logging.Handler):
    """Write to whatever sys.stderr is at that moment: above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        # as logging's own handlers do: a closed stderr must not stop the work
        except Exception:
            self.handleError(record)


def configure(verbosity: int, *, rank: int | None = None) -> None:
    """Send our loggers to stderr. `verbosity`: -1 warnings, 0 information, 1 everything; ranks
    above 0 only warn."""
    level = {-1: logging.WARNING, 0: logging.INFO}.get(max(-1, min(verbosity, 1)), logging.DEBUG)
    if rank:
        level = max(level, logging.WARNING)
    where = "" if rank is None else f" [rank {rank}]"
    handler = _StderrHandler()
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s{where} %(levelname).1s %(message)s", "%H:%M:%S")
    )
    # a library that configures root must neither silence nor double our lines
    for name in _PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
