"""Losses that jump out of a run's recent past, with the rows that made them: one line, and one in
RUN/spikes.jsonl.

A step's loss is a spike if it exceeds

    median + log.spike_sigma * max(1.4826 * MAD, 0.01 * median)

of the last 128 losses before it (at least 20), where MAD is their median absolute deviation and
1.4826 makes it a standard deviation where losses are normally distributed. Medians stay what they
are when a spike joins them. The losses are those that a log line fetches anyway; the past is that
of this call.
"""

import json
import logging
import statistics
from collections import deque
from pathlib import Path

from train.data.loader import StepLoader
from train.data.provenance import first_few, step_rows
from train.run.records import keep_records

logger = logging.getLogger(__name__)

_PAST = 128
_ENOUGH = 20


class SpikeLog:
    """The recent losses of a run, and the file of its spikes; on rank 0."""

    def __init__(self, path: Path, *, sigma: float, after_step: int) -> None:
        """Open the log of a run that goes on after step `after_step`: later records go away. A
        `sigma` of 0 is off."""
        keep_records(path, up_to_step=after_step)
        self._path = path
        self._sigma = sigma
        self._past: deque[float] = deque(maxlen=_PAST)

    def look_at(self, steps: list[int], losses: list[float], feed: StepLoader) -> None:
        """Report the spikes among the losses of `steps`, counted from 1."""
        for step, loss in zip(steps, losses, strict=True):
            limit = self._limit()
            if limit is not None and loss > limit:
                self._report(step, loss, limit, feed)
            self._past.append(loss)

    def _limit(self) -> float | None:
        if not self._sigma or len(self._past) < _ENOUGH:
            return None
        median = statistics.median(self._past)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self._past)
        return median + self._sigma * max(deviation, 0.01 * median)

    def _report(self, step: int, loss: float, limit: float, feed: StepLoader) -> None:
        rows = step_rows(feed.plan(step - 1), feed.shard_set.manifest)
        expected = statistics.median(self._past)
        record = {"step": step, "loss": loss, "expected": expected, "limit": limit, "rows": rows}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")
        logger.warning(
            "step %d: the loss spiked to %.4f (recent median %.4f, limit %.4f). Its rows: %s; all"
            " in %s",
            *(step, loss, expected, limit, first_few(rows), self._path),
        )
