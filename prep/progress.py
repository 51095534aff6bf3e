"""Progress of long work on stderr: a live bar on a terminal, else a log line every few seconds."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Protocol

_LOG_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Advance(Protocol):
    def __call__(self, done: int, note: str = "", /) -> None:
        """Add `done` units of work; `note` is shown beside the rate."""


@contextlib.contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Advance]:
    """Yield a function that reports work done, in `unit`s of `total` (0 where it is unknown)."""
    if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
        with _bar(title, total, unit) as bar:
            yield bar
        return
    started = last_line = time.monotonic()
    done = 0

    def advance(number: int, note: str = "") -> None:
        nonlocal last_line, done
        done += number
        now = time.monotonic()
        if now - last_line < _LOG_SECONDS:
            return
        last_line = now
        rate = done / (now - started)
        share = f" of {total:,}" if total else ""
        left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
        # ready-made text: a log formats %-style arguments without thousands separators
        line = f"{title}: {done:,}{share} {unit}, {rate:,.0f}/s{left} {note}"
        logger.info("%s", line)

    yield advance


@contextlib.contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # The rate is an average since the start: chunks end in bursts, and a momentary rate would jump.
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total or None, rate="")
        started, done = time.monotonic(), 0

        def advance(number: int, note: str = "") -> None:
            nonlocal done
            done += number
            rate = done / max(time.monotonic() - started, 1e-9)
            bar.update(task, completed=done, rate=f"{done:,} {unit}  {rate:,.0f}/s  {note}")

        yield advance
