"""What a run reports: metrics.jsonl, the console line, and Weights & Biases if log.wandb is set.

All three show the same record:

    step, epoch               updates done; passes over the packs that they make
    learning_rate             of the last update
    train_loss                mean over the window's steps of the exact loss of the global batch,
                              normalised by loss.norm; null if they held no loss token
    grad_norm                 of the last step, before clipping; null if its update was skipped
    skipped_steps             steps skipped since the start of the run (`run.on_non_finite =
                              "skip"`)
    train_loss/SOURCE         mean over the window's loss tokens of a source, whatever loss.norm is;
                              null if there were none
    load_balancing_loss       mean over the window's steps, without its weight; null for a model
                              that has none
    loss_tokens               loss tokens in the window
    loss_tokens_per_second    over all ranks, over the window
    padding_share             of the positions in the window: fillers of ranks without a
                              micro-batch, and padding that makes a row divide over the ranks that
                              share it; packs themselves are not padded
    total_tokens, total_tokens_including_padding  since the start of the run, over all ranks
    per_device_tps, per_device_tps_including_padding  tokens per second and rank, over the window
    step_seconds, data_seconds  mean per step: the whole step, and its wait for data
    mfu                       see train/sizing/flops.py; null if the device's peak is not known
    memory_gib                peak on this rank: of the GPU, or of the process on a CPU

An evaluation writes another record:

    step, epoch                              as above
    eval_loss                 mean cross-entropy over the loss tokens of the evaluation set
    eval_loss/SOURCE          over those of one of its sources; null if it has none
    eval_tokens, eval_seconds  the number of these loss tokens; how long the evaluation took

A window is the steps since the last record (`log.every_steps`). Steps and counts are integers, the
rest are floats.
"""

import json
import logging
import resource
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from shared.errors import PrerequisiteError
from train.config import LogConfig
from train.engine.process_group import Ranks
from train.loop.metrics_window import MetricsWindow
from train.run.records import keep_records
from train.run.train_state import Counters, WindowSums
from train.sizing.flops import ModelCost

logger = logging.getLogger(__name__)


def make_record(
    window: MetricsWindow,
    sums: WindowSums,
    counters: Counters,
    *,
    ranks: Ranks,
    cost: ModelCost,
    peak: float | None,
) -> dict[str, Any]:
    """Return the part of a record that follows from the window and the counters.

    Sums and counters include the steps before a resume in the middle of the window; speeds do not.
    """
    seconds = time.perf_counter() - window.started
    steps = max(1, window.steps)
    if ranks.device.type == "cuda":
        memory_gib = torch.cuda.max_memory_allocated(ranks.device) / 2**30
    else:
        # Linux counts it in KiB.
        memory_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    flops = cost.flops(
        tokens=window.tokens, loss_tokens=window.loss_tokens, squared_lengths=window.squared_lengths
    )
    return {
        "grad_norm": window.grad_norm,
        "train_loss": sum(sums.losses) / len(sums.losses) if sums.losses else None,
        "load_balancing_loss": (
            sum(sums.balancing) / len(sums.balancing) if sums.balancing else None
        ),
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
        "memory_gib": memory_gib,
    }


class MetricsLog:
    """Rank 0's records: appended to metrics.jsonl, shown on the console, sent to Weights &
    Biases."""

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
        """Open the log of a run that resumes after step `after_step`.

        Later records go away, and so does a last line that a crash cut short.
        """
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
            shown = {key: value for key, value in record.items() if value is not None}
            self._wandb.log(shown, step=record["step"])

    def write_eval(self, record: dict[str, Any]) -> None:
        """Write the record of an evaluation."""
        self._append(record)
        logger.info(
            "step %d: evaluation loss %.4f, %.1f s",
            record["step"],
            record["eval_loss"],
            record["eval_seconds"],
        )

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def console_line(record: dict[str, Any], total_steps: int) -> str:
    """Return one line with the numbers that people watch."""
    parts = [
        f"step {record['step']}/{total_steps}",
        "loss -" if record["train_loss"] is None else f"loss {record['train_loss']:.4f}",
        f"lr {record['learning_rate']:.2e}",
        "grad -" if record["grad_norm"] is None else f"grad {record['grad_norm']:.3g}",
        f"{record['per_device_tps']:,.0f} tok/s/device",
        f"{record['step_seconds']:.2f} s/step",
    ]
    if record["mfu"] is not None:
        parts.append(f"mfu {record['mfu']:.1%}")
    return "  ".join(parts)


def _start_wandb(
    folder: Path, config: LogConfig, run_name: str, wandb_id: str, recipe: dict[str, Any]
) -> Any:
    """Return the Weights & Biases run, or None if it is off.

    Raises PrerequisiteError if the package is missing or refuses the login.
    """
    if config.wandb == "off":
        return None
    try:
        import wandb
    except ImportError as exc:
        raise PrerequisiteError(
            f"log.wandb = {config.wandb!r} needs the package wandb; install it or set off"
        ) from exc
    try:
        return wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or run_name,
            id=wandb_id,
            resume="allow",
            mode=config.wandb,
            dir=str(folder),
            config=recipe,
            # Or it would wrap stderr, where our log goes.
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.Error as exc:
        raise PrerequisiteError(
            f"log.wandb = {config.wandb!r}: {' '.join(str(exc).split())}; log in with `wandb"
            " login`, or set offline or off"
        ) from exc
