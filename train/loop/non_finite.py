"""A step whose loss or gradient is not a number: its update was refused on every rank, and the
weights are as before.

The run stops there and names what the step held, or leaves the step out and goes on
(`run.on_non_finite`). Ranks talk to each other here, which costs nothing where nothing goes wrong.
"""

import logging

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
    feed: StepLoader,
    ranks: Ranks,
) -> None:
    """Log what the step held; raise DataError, the same on every rank, unless it may be left out.

    `losses` are those of this rank's micro-batches; `skipped_steps` counts those left out so far,
    this one included.
    """
    own = [
        number
        for number, loss in enumerate(losses.tolist())
        if not torch.isfinite(torch.tensor(loss))
    ]
    everywhere = gather_to_main(own, ranks)
    what = broadcast_from_main(_in_words(batch, everywhere, feed) if ranks.is_main else None, ranks)
    message = (
        f"step {batch.step + 1}: the loss or a gradient is not finite; the weights were left as"
        f" they were. {what}"
    )
    if config.on_non_finite == "stop":
        raise DataError(
            f"{message}; lower optim.learning_rate, look at them, or set run.on_non_finite = 'skip'"
            " to leave such steps out"
        )
    if skipped_steps > config.max_skipped:
        raise DataError(
            f"{message}; run.max_skipped = {config.max_skipped} steps were left out before it."
            " Lower optim.learning_rate, look at the rows, or raise run.max_skipped"
        )
    logger.warning("%s. Left out (%d of at most %d)", message, skipped_steps, config.max_skipped)


def _in_words(batch: StepBatch, bad_micro_batches: list[object], feed: StepLoader) -> str:
    """Name the packs, then the rows: those whose loss was not finite, or all where only a gradient
    was not."""
    manifest, plan = feed.shard_set.manifest, feed.plan(batch.step)
    found: list[str] = []
    places: list[str] = []
    for rank, numbers in enumerate(bad_micro_batches):
        assert isinstance(numbers, list)
        for number in numbers:
            found += micro_batch_rows(plan, rank // feed.sequence_parallel, number, manifest)
            places.append(f"rank {rank} micro-batch {number + 1}")
    packs = (
        f"Its packs: {first_few([str(unit) for unit in batch.ids])}. "
        if batch.unit == "pack"
        else ""
    )
    rows = first_few(list(dict.fromkeys(found))) if found else first_few(step_rows(plan, manifest))
    where = f"The loss was not finite in {first_few(places)}, rows" if found else "Its rows:"
    return f"{packs}{where} {rows} (sft-prep inspect {feed.shard_set.path} --row SOURCE:ROW)"
