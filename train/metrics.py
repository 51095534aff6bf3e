"""What a run reports: metrics.jsonl, the console line, and Weights & Biases if asked. All three show the same record.

    step, epoch                              updates done; passes over the packs that lie behind
    learning_rate                            of the last update
    train_loss                               mean over the window's steps of the exact loss of the global batch,
                                             normalised as loss.norm says; null if they held no loss token
    grad_norm                                of the last step, before clipping; null if its update was left out
    skipped_steps                            steps left out since the start of the run (`run.on_non_finite = "skip"`)
    train_loss/SOURCE                        mean over the window's loss tokens of a source, whatever loss.norm is; null
                                             if there were none
    load_balancing_loss                      mean over the window's steps, without its weight; null where there is none
    loss_tokens                              targets in the window
    loss_tokens_per_second                   goodput: targets per second over all ranks, over the window
    padding_share                            of the positions in the window: fillers of ranks without a micro-batch, and
                                             what makes shared rows divide; packs themselves are not padded
    total_tokens, total_tokens_including_padding      since the start of the run, over all ranks
    per_device_tps, per_device_tps_including_padding  tokens per second and rank, over the window
    step_seconds, data_seconds               mean per step: all of it, and the wait for data
    mfu                                      see train/flops.py; null where the device's peak is not known
    memory_gib                               peak on this rank: of the GPU, or of the process on a CPU

An evaluation has a record of its own:

    step, epoch                              as above
    eval_loss                                mean cross-entropy over the loss tokens of the evaluation set
    eval_loss/SOURCE                         over those of one of its sources; null if it has none
    eval_tokens, eval_seconds                how many those are; how long it took

A window is the steps since the last record (`log.every_steps`). Steps and counts are integers, all else fractions.
"""

import json
import logging
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from shared import atomic
from train.by_source import empty_totals
from train.config import LogConfig
from train.distributed import Ranks, sum_over_ranks
from train.feed import StepBatch
from train.flops import ModelCost

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Counters:
    """Totals since the start of the run; part of every checkpoint."""

    tokens: int = 0
    positions: int = 0
    loss_tokens: int = 0
    skipped_steps: int = 0


@dataclass(kw_only=True, slots=True)
class Window:
    """The steps since the last record. Losses stay on the device until someone looks."""

    losses: list[torch.Tensor] = field(default_factory=list)  # this rank's part, fp32 [1] each
    loss_steps: list[int] = field(default_factory=list)  # the steps of the last of these losses, counted from 1
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    tokens: int = 0
    positions: int = 0
    loss_tokens: int = 0
    squared_lengths: int = 0
    data_seconds: float = 0.0
    source_totals: torch.Tensor  # float64 [2, 1 + num_sources], this rank's part; see train/by_source.py
    balancing: list[torch.Tensor] = field(default_factory=list)  # this rank's part, fp32 [1] each
    carried_loss_tokens: int = 0
    """Those of the window before the run was resumed in the middle of it."""

    def add(
        self,
        batch: StepBatch,
        losses: torch.Tensor,
        source_totals: torch.Tensor,
        balancing: torch.Tensor | None,
        *,
        is_skipped: bool,
        data_seconds: float,
    ) -> None:
        """Add a step and the losses of its micro-batches on this rank; those of a skipped step are no numbers."""
        if batch.num_loss_tokens and not is_skipped:
            self.losses.append(losses.sum(0, keepdim=True))
            self.loss_steps.append(batch.step + 1)
            self.source_totals += source_totals
            if balancing is not None:
                self.balancing.append(balancing)
        self.steps += 1
        self.tokens += batch.num_tokens
        self.positions += batch.num_positions
        self.loss_tokens += batch.num_loss_tokens
        self.squared_lengths += batch.squared_lengths
        self.data_seconds += data_seconds

    def sums(self, ranks: Ranks) -> "WindowSums":
        """Return what the window has gathered, over all ranks: one message, and the one wait for the device."""
        num_losses, num_columns = len(self.losses), self.source_totals.shape[1]
        loss_tokens = self.carried_loss_tokens + self.loss_tokens
        if not num_losses:  # nothing to wait for
            none = [0.0] * num_columns
            return WindowSums(losses=[], balancing=[], source_losses=none, source_tokens=none, loss_tokens=loss_tokens)
        parts = [*(loss.double() for loss in [*self.losses, *self.balancing]), self.source_totals.flatten()]
        values: list[float] = sum_over_ranks(torch.cat(parts), ranks).tolist()
        first = num_losses + len(self.balancing)
        return WindowSums(
            losses=values[:num_losses],
            balancing=values[num_losses:first],
            source_losses=values[first : first + num_columns],
            source_tokens=values[first + num_columns :],
            loss_tokens=loss_tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSums:
    """A window over all ranks; part of a checkpoint, so that a resumed run logs what an undisturbed one does."""

    losses: list[float]
    """Of each step that had one."""
    balancing: list[float]
    """The load balancing loss of each of these steps; empty where there is none."""
    source_losses: list[float]
    """Sum of the cross-entropies of each source, the fillers before them."""
    source_tokens: list[float]
    """How many those are."""
    loss_tokens: int


def open_window(num_sources: int, ranks: Ranks, carried: WindowSums | None = None) -> Window:
    """Return an empty window, or one that goes on from what a checkpoint carried: its sums count on rank 0 only."""
    if carried is None:
        return Window(source_totals=empty_totals(num_sources, ranks.device))
    share = 1.0 if ranks.is_main else 0.0
    values = [carried.source_losses, carried.source_tokens]
    return Window(
        losses=[torch.tensor([loss * share], dtype=torch.float32, device=ranks.device) for loss in carried.losses],
        balancing=[
            torch.tensor([loss * share], dtype=torch.float32, device=ranks.device) for loss in carried.balancing
        ],
        source_totals=share * torch.tensor(values, dtype=torch.float64, device=ranks.device),
        carried_loss_tokens=carried.loss_tokens,
    )


def make_record(
    window: Window, sums: WindowSums, counters: Counters, *, ranks: Ranks, cost: ModelCost, peak: float | None
) -> dict[str, Any]:
    """Return the part of a record that follows from the window and the counters."""
    seconds = time.perf_counter() - window.started
    steps = max(1, window.steps)
    flops = cost.flops(tokens=window.tokens, loss_tokens=window.loss_tokens, squared_lengths=window.squared_lengths)
    return {
        "train_loss": sum(sums.losses) / len(sums.losses) if sums.losses else None,
        "load_balancing_loss": sum(sums.balancing) / len(sums.balancing) if sums.balancing else None,
        "loss_tokens": sums.loss_tokens,
        "loss_tokens_per_second": window.loss_tokens / seconds,
        "padding_share": 1.0 - window.tokens / window.positions if window.positions else 0.0,
        "total_tokens": counters.tokens,
        "total_tokens_including_padding": counters.positions,
        "skipped_steps": counters.skipped_steps,
        "per_device_tps": window.tokens / seconds / ranks.world_size,
        "per_device_tps_including_padding": window.positions / seconds / ranks.world_size,
        "step_seconds": seconds / steps,
        "data_seconds": window.data_seconds / steps,
        "mfu": None if peak is None else flops / seconds / ranks.world_size / peak,
        "memory_gib": _peak_memory_gib(ranks.device),
    }


class MetricsLog:
    """Rank 0's records: appended to metrics.jsonl, shown on the console, sent to Weights & Biases."""

    def __init__(
        self,
        path: Path,
        *,
        config: LogConfig,
        run_name: str,
        wandb_id: str,
        recipe: dict[str, Any],
        after_step: int,
        is_evaluated: bool,
    ) -> None:
        """Open the log of a run that goes on after step `after_step`: later records, and a torn last line, go away."""
        keep_records(path, up_to_step=after_step, is_evaluated=is_evaluated)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(path.parent, config, run_name, wandb_id, recipe)

    def write(self, record: dict[str, Any], *, total_steps: int) -> None:
        self._append(record)
        logger.info("%s", console_line(record, total_steps))

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in record.items() if value is not None}, step=record["step"])

    def write_eval(self, record: dict[str, Any]) -> None:
        """Write the record of an evaluation."""
        self._append(record)
        logger.info(
            "step %d: evaluation loss %.4f, %.1f s", record["step"], record["eval_loss"], record["eval_seconds"]
        )

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def console_line(record: dict[str, Any], total_steps: int) -> str:
    """Return one line with the numbers that people watch."""
    loss = "-" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
    parts = [
        f"step {record['step']}/{total_steps}",
        f"loss {loss}",
        f"lr {record['learning_rate']:.2e}",
        "grad -" if record["grad_norm"] is None else f"grad {record['grad_norm']:.3g}",
        f"{record['per_device_tps']:,.0f} tok/s/device",
        f"{record['step_seconds']:.2f} s/step",
    ]
    if record["mfu"] is not None:
        parts.append(f"mfu {record['mfu']:.1%}")
    return "  ".join(parts)


def keep_records(path: Path, *, up_to_step: int, is_evaluated: bool = True) -> None:
    """Drop the records of metrics.jsonl after step `up_to_step`, and a last line that a crash cut short.

    If that step is yet to be evaluated, a record of its evaluation goes too.
    """
    if not path.exists():
        return
    kept = [
        record
        for record in read_records(path)
        if record["step"] <= up_to_step and (is_evaluated or record["step"] < up_to_step or "eval_loss" not in record)
    ]
    lines = "".join(json.dumps(record, sort_keys=True, allow_nan=False) + "\n" for record in kept)
    atomic.write_bytes(path, lines.encode("utf-8"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; a last line that a crash cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _start_wandb(folder: Path, config: LogConfig, run_name: str, wandb_id: str, recipe: dict[str, Any]) -> Any:
    if config.wandb == "off":
        return None
    try:
        import wandb
    except ImportError as exc:
        from shared.errors import PrerequisiteError

        raise PrerequisiteError(f"log.wandb = {config.wandb!r} needs the package wandb; install it or set off") from exc
    return wandb.init(
        project=config.wandb_project,
        name=config.wandb_name or run_name,
        id=wandb_id,
        resume="allow",
        mode=config.wandb,
        dir=str(folder),
        config=recipe,
        settings=wandb.Settings(console="off", silent=True),  # it would wrap stderr, where our log goes
    )


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB
