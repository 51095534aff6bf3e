"""A step whose loss or gradient is not finite: every rank has skipped its update, and the weights
are unchanged.

The run stops and names what the step held, or skips the step (`run.on_non_finite`). The ranks
exchange messages here, which only a step that went wrong has to pay for.
"""

import logging
import math
from typing import cast

import torch

from shared.errors import DataError
from train.config import RunConfig
from train.data.loader import StepBatch, StepLoader
from train.data.provenance import first_few, micro_batch_rows, step_rows
from train.engine.process_group import Ranks, broadcast_from_main, gather_to_main

logger = logging.getLogger(__name__)


def handle_non_finite_step(
    batch: StepBatch,
    losses: torch.Tensor,
    *,
    config: RunConfig,
    skipped_steps: int,
    loader: StepLoader,
    ranks: Ranks,
) -> None:
    """Log what the step held. Raise DataError, the same on every rank, unless it may be skipped.

    `losses` are those of this rank's micro-batches; `skipped_steps` counts the steps skipped so
    far, this one included.
    """
    # A rank knows the losses of its own micro-batches alone; rank 0 names those of all ranks.
    bad_micro_batches = [n for n, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
    bad_by_rank = gather_to_main(bad_micro_batches, ranks)
    text = _describe_rows(batch, bad_by_rank, loader) if ranks.is_main else None
    message = (
        f"step {batch.step + 1}: the loss or a gradient is not finite; the weights are unchanged."
        f" {broadcast_from_main(text, ranks)}"
    )
    if config.on_non_finite == "stop":
        raise DataError(
            f"{message}; lower optim.learning_rate, look at the rows, or set run.on_non_finite ="
            " 'skip' to skip such steps"
        )
    if skipped_steps > config.max_skipped:
        raise DataError(
            f"{message}; run.max_skipped = {config.max_skipped} steps were skipped before it. Lower"
            " optim.learning_rate, look at the rows, or raise run.max_skipped"
        )
    logger.warning("%s. Skipped (%d of at most %d)", message, skipped_steps, config.max_skipped)


def _describe_rows(batch: StepBatch, bad_by_rank: list[object], loader: StepLoader) -> str:
    """Name the packs of the step, and the rows whose loss was not finite; all its rows if only a
    gradient was not."""
    manifest, plan = loader.shard_set.manifest, loader.plan(batch.step)
    bad_rows: dict[str, None] = {}
    micro_batches: list[str] = []
    for rank, numbers in enumerate(bad_by_rank):
        for number in cast(list[int], numbers):
            # Ranks that share rows hold slices of the same micro-batch.
            group = rank // loader.sequence_parallel
            bad_rows |= dict.fromkeys(micro_batch_rows(plan, group, number, manifest))
            micro_batches.append(f"rank {rank} micro-batch {number + 1}")
    text = f"Its rows: {first_few(step_rows(plan, manifest))}"
    if bad_rows:
        where, rows = first_few(micro_batches), first_few(list(bad_rows))
        text = f"The loss was not finite in {where}, rows {rows}"
    if batch.unit == "pack":
        text = f"Its packs: {first_few([str(unit) for unit in batch.ids])}. {text}"
    return f"{text} (sft-prep inspect {loader.shard_set.path} --row SOURCE:ROW)"
