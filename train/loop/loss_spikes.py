"""Losses that jump far above a run's recent ones, reported with the rows of their step: a warning,
and a line of RUN/spikes.jsonl.

A step's loss is a spike if it exceeds

    median + log.spike_sigma * max(1.4826 * MAD, 0.01 * median)

of the last 128 losses before it (at least 20), where MAD is their median absolute deviation and
1.4826 turns it into a standard deviation if losses are normally distributed. A spike among the
recent losses hardly moves a median. The losses are those that a record fetches anyway; those of an
earlier call do not count as recent.
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

_NUM_RECENT = 128
_MIN_RECENT = 20


class SpikeLog:
    """The recent losses of a run, and the file of its spikes; on rank 0."""

    def __init__(self, path: Path, *, sigma: float, after_step: int) -> None:
        """Open the log of a run that resumes after step `after_step`, and drop later records.

        A `sigma` of 0 reports nothing.
        """
        keep_records(path, up_to_step=after_step)
        self._path = path
        self._sigma = sigma
        self._recent: deque[float] = deque(maxlen=_NUM_RECENT)

    def check(self, steps: list[int], losses: list[float], loader: StepLoader) -> None:
        """Report the spikes among the losses of `steps`, counted from 1."""
        for step, loss in zip(steps, losses, strict=True):
            recent = list(self._recent)
            self._recent.append(loss)
            if not self._sigma or len(recent) < _MIN_RECENT:
                continue
            median = statistics.median(recent)
            deviation = 1.4826 * statistics.median(abs(other - median) for other in recent)
            # The floor of 1 % keeps the tiny deviations of a flat loss from making spikes of noise.
            limit = median + self._sigma * max(deviation, 0.01 * median)
            if loss <= limit:
                continue
            rows = step_rows(loader.plan(step - 1), loader.shard_set.manifest)
            record = {"step": step, "loss": loss, "expected": median, "limit": limit, "rows": rows}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, sort_keys=True) + "\n")
            logger.warning(
                "step %d: the loss spiked to %.4f (recent median %.4f, limit %.4f). Its rows: %s;"
                " all in %s",
                *(step, loss, median, limit, first_few(rows), self._path),
            )
