"""The steps since the last record. What they computed stays on the device until it is read: one
wait for all of it.

Also whether a step was refused, its weights left alone, may not be known before: such steps are
told apart then.
"""

import math
import time
from dataclasses import dataclass, field, replace

import torch

from train.data.loader import StepBatch
from train.engine.process_group import Ranks, sum_over_ranks
from train.model.source_loss import empty_totals
from train.run.train_state import WindowSums


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step left on the device."""

    batch: StepBatch
    """Without its micro-batches once it is in a window."""
    losses: (
        torch.Tensor
    )  # of this rank's micro-batches: their parts of the step's loss; fp32 [num_micro_batches]
    source_totals: (
        torch.Tensor
    )  # this rank's part, float64 [2, 1 + num_sources]; see train/model/source_loss.py
    balancing: torch.Tensor | None  # this rank's part of the load balancing loss, fp32 [1]
    refused: torch.Tensor  # whether the update was refused, the same on all ranks; bool []
    grad_norm: torch.Tensor | float  # before clipping, the same on all ranks; fp32 []


@dataclass(kw_only=True, slots=True)
class MetricsWindow:
    """Counts are known at once, and the same on every rank; losses are read together."""

    source_totals: (
        torch.Tensor
    )  # of the steps that were not refused, this rank's part; float64 [2, 1 + num_sources]
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    tokens: int = 0
    positions: int = 0
    loss_tokens: int = 0
    squared_lengths: int = 0
    data_seconds: float = 0.0
    carried_loss_tokens: int = 0
    """Those of the window before the run was resumed in the middle of it."""
    losses: list[float] = field(default_factory=list)
    """Read, over all ranks."""
    balancing: list[float] = field(default_factory=list)
    loss_steps: list[int] = field(default_factory=list)
    """The steps of the last of `losses`, counted from 1: those before are of another call."""
    grad_norm: float | None = None
    """Of the last step that was read; None if its update was refused."""
    unread: list[StepResult] = field(default_factory=list)

    def add(self, result: StepResult, *, data_seconds: float) -> None:
        """Add a step, without waiting for the device."""
        batch = result.batch
        if batch.num_loss_tokens:
            self.source_totals += torch.where(
                result.refused, 0.0, result.source_totals
            )  # they may be no numbers
        self.unread.append(replace(result, batch=replace(batch, micro_batches=[])))
        self.steps += 1
        self.tokens += batch.num_tokens
        self.positions += batch.num_positions
        self.loss_tokens += batch.num_loss_tokens
        self.squared_lengths += batch.squared_lengths
        self.data_seconds += data_seconds

    def read(self, ranks: Ranks) -> tuple[WindowSums, list[StepResult]]:
        """Return what the window has gathered, over all ranks, and the refused steps of which
        nobody knew yet.

        One message between ranks, and one wait for the device.
        """
        if not self.steps and not self.losses:
            return self._sums([0.0] * self.source_totals.numel()), []
        size, columns = 4, self.source_totals.shape[1]
        parts = [_as_numbers(result, ranks) for result in self.unread]
        values: list[float] = sum_over_ranks(
            torch.cat([self.source_totals.flatten(), *parts]), ranks
        ).tolist()
        found = []
        for number, result in enumerate(self.unread):
            start = 2 * columns + size * number
            loss, balancing, refused, norm = values[start : start + size]
            self.grad_norm = norm if not refused and math.isfinite(norm) else None
            if refused:
                found.append(result)
            elif result.batch.num_loss_tokens:
                self.losses.append(loss)
                self.loss_steps.append(result.batch.step + 1)
                if result.balancing is not None:
                    self.balancing.append(balancing)
        self.unread = []
        return self._sums(values[: 2 * columns]), found

    def _sums(self, source_totals: list[float]) -> WindowSums:
        columns = self.source_totals.shape[1]
        return WindowSums(
            losses=[*self.losses],
            balancing=[*self.balancing],
            source_losses=source_totals[:columns],
            source_tokens=source_totals[columns:],
            loss_tokens=self.carried_loss_tokens + self.loss_tokens,
        )


def _as_numbers(result: StepResult, ranks: Ranks) -> torch.Tensor:
    """Return what is to be read of a step as float64 [4]; what all ranks know comes from rank 0
    alone."""
    zero = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    balancing = zero if result.balancing is None else result.balancing.double()
    loss = result.losses.sum(0, keepdim=True).double()
    if not ranks.is_main:
        return torch.cat([loss, balancing, zero, zero])
    norm = torch.as_tensor(result.grad_norm, dtype=torch.float64, device=ranks.device).reshape(1)
    return torch.cat([loss, balancing, result.refused.double().reshape(1), norm])


def open_window(num_sources: int, ranks: Ranks, carried: WindowSums | None = None) -> MetricsWindow:
    """Return an empty window, or one that goes on from what a checkpoint carried: sums by source,
    on rank 0 only."""
    if carried is None:
        return MetricsWindow(source_totals=empty_totals(num_sources, ranks.device))
    share = 1.0 if ranks.is_main else 0.0
    values = [carried.source_losses, carried.source_tokens]
    return MetricsWindow(
        source_totals=share * torch.tensor(values, dtype=torch.float64, device=ranks.device),
        losses=[*carried.losses],
        balancing=[*carried.balancing],
        carried_loss_tokens=carried.loss_tokens,
    )
