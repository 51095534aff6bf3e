"""The steps since the last record of metrics.jsonl, and how their losses get from the device to it.

Reading a number makes the host wait until the device has caught up. So a step leaves its numbers on
the device, and `read` fetches those of all steps at once: one message between ranks, one wait. Each
rank sends one float64 vector, and the sum of the vectors holds all that a record needs:

    source losses    source counts    first pending step           ...    last pending step
    1 + sources      1 + sources      loss balancing skipped norm        4 numbers

Only then does the host learn which updates were skipped because a gradient was not finite.
"""

import math
import time
from dataclasses import dataclass, field, replace

import torch

from train.data.loader import StepBatch
from train.engine.process_group import Ranks, sum_over_ranks
from train.model.source_loss import empty_totals
from train.run.train_state import WindowSums

_NO_SUMS = WindowSums(losses=[], balancing=[], source_losses=[], source_tokens=[], loss_tokens=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The numbers of one step, still on the device."""

    batch: StepBatch
    """Without its micro-batches once it is in a window."""
    losses: torch.Tensor
    """What each micro-batch of this rank adds to the loss of the step; fp32 [num_micro_batches]."""
    source_totals: torch.Tensor
    """This rank's share, float64 [2, 1 + num_sources]; see train/model/source_loss.py."""
    balancing: torch.Tensor | None
    """This rank's share of the load balancing loss, fp32 [1]."""
    skipped: torch.Tensor
    """Whether the update was skipped, the same on all ranks; bool []."""
    grad_norm: torch.Tensor | float
    """Before clipping, the same on all ranks; fp32 []."""


@dataclass(kw_only=True, slots=True)
class MetricsWindow:
    """Counts of tokens are known at once and are the same on every rank; losses wait for `read`."""

    source_totals: torch.Tensor
    """This rank's share of all steps that were not skipped; float64 [2, 1 + num_sources]."""
    resumed: WindowSums | None = None
    """The first steps of the window, if the run was resumed in the middle of it."""
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    tokens: int = 0
    positions: int = 0
    loss_tokens: int = 0
    squared_lengths: int = 0
    data_seconds: float = 0.0
    pending: list[StepResult] = field(default_factory=list)
    """The steps that are not read yet."""
    losses: list[float] = field(default_factory=list)
    """Over all ranks, of the steps that were read, had loss tokens and were not skipped."""
    loss_steps: list[int] = field(default_factory=list)
    """The numbers of these steps, counted from 1."""
    balancing: list[float] = field(default_factory=list)
    grad_norm: float | None = None
    """Of the last step that was read; None if its update was skipped."""

    def add(self, result: StepResult, *, data_seconds: float) -> None:
        """Add a step, without waiting for the device."""
        batch = result.batch
        if batch.num_loss_tokens:
            # The totals of a skipped step may be NaN, and no later step could undo that. Only the
            # device knows yet whether this step was skipped, so the device makes the choice.
            self.source_totals += torch.where(result.skipped, 0.0, result.source_totals)
        self.pending.append(replace(result, batch=replace(batch, micro_batches=[])))
        self.steps += 1
        self.tokens += batch.num_tokens
        self.positions += batch.num_positions
        self.loss_tokens += batch.num_loss_tokens
        self.squared_lengths += batch.squared_lengths
        self.data_seconds += data_seconds

    def read(self, ranks: Ranks) -> tuple[WindowSums, list[StepResult]]:
        """Return the sums of the window over all ranks, and the pending steps that were skipped.

        Every rank has to call it after the same step. A window may be read more than once: by a
        save in the middle of it, and for its record.
        """
        zero = torch.zeros(1, dtype=torch.float64, device=ranks.device)
        vector = [self.source_totals.flatten()]
        for result in self.pending:
            vector.append(result.losses.sum(0, keepdim=True).double())
            vector.append(zero if result.balancing is None else result.balancing.double())
            # Every rank knows these two. Only rank 0 sends them, so that the sum is the value.
            for known in (result.skipped, result.grad_norm):
                number = torch.as_tensor(known, dtype=torch.float64, device=ranks.device)
                vector.append(number.reshape(1) if ranks.is_main else zero)

        # A save right after a record finds nothing to read: it costs no message and no wait.
        values = [0.0] * self.source_totals.numel()
        if self.steps or self.resumed is not None:
            values = sum_over_ranks(torch.cat(vector), ranks).tolist()

        columns = self.source_totals.shape[1]
        skipped_steps = []
        for index, result in enumerate(self.pending):
            loss, balancing, skipped, norm = values[2 * columns + 4 * index :][:4]
            self.grad_norm = norm if not skipped and math.isfinite(norm) else None
            if skipped:
                skipped_steps.append(result)
            elif result.batch.num_loss_tokens:
                self.losses.append(loss)
                self.loss_steps.append(result.batch.step + 1)
                if result.balancing is not None:
                    self.balancing.append(balancing)
        self.pending = []
        before = self.resumed or _NO_SUMS
        sums = WindowSums(
            losses=before.losses + self.losses,
            balancing=before.balancing + self.balancing,
            source_losses=values[:columns],
            source_tokens=values[columns : 2 * columns],
            loss_tokens=before.loss_tokens + self.loss_tokens,
        )
        return sums, skipped_steps


def open_window(num_sources: int, ranks: Ranks, resumed: WindowSums | None = None) -> MetricsWindow:
    """Return an empty window, or one that continues the sums of a checkpoint."""
    totals = empty_totals(num_sources, ranks.device)
    if resumed is not None and ranks.is_main:
        # The sums of a checkpoint are those of all ranks, so one rank alone starts from them.
        totals += totals.new_tensor([resumed.source_losses, resumed.source_tokens])
    return MetricsWindow(source_totals=totals, resumed=resumed)
