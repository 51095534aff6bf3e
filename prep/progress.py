"""Progress of long work: a live bar on a terminal, a plain line every few seconds in a log. Always
on stderr."""

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
    """Yield a function that reports work done, in `unit`s of `total` (0 where it is not known)."""
    if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
        with _bar(title, total, unit) as advance:
            yield advance
    else:
        yield _lines(title, total, unit)


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
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total or None, rate="")
        began, done = time.monotonic(), 0

        def advance(number: int, note: str = "") -> None:
            nonlocal done
            done += number
            rate = done / max(time.monotonic() - began, 1e-9)
            bar.update(task, completed=done, rate=f"{done:,} {unit}  {rate:,.0f}/s  {note}")

        yield advance


def _lines(title: str, total: int, unit: str) -> Advance:
    began = shown = time.monotonic()
    done = 0

    def advance(number: int, note: str = "") -> None:
        nonlocal shown, done
        done += number
        now = time.monotonic()
        if now - shown >= _LOG_SECONDS:
            shown = now
            rate = done / (now - began)
            left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
            share = f" of {total:,}" if total else ""
            logger.info(
                "%s: %s%s %s, %s/s%s %s",
                title,
                f"{done:,}",
                share,
                unit,
                f"{rate:,.0f}",
                left,
                note,
            )

    return advance
