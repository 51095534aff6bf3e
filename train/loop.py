"""The training loop: plan and fetch, forward and backward, update, log, checkpoint; in that order, one step a turn."""

import gc
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.errors import DataError, StoppedOnRequest
from train.checkpoint import TrainState, save_checkpoint
from train.distributed import Ranks, any_rank
from train.engine import accumulate, update
from train.feed import Feed, StepBatch
from train.flops import ModelCost, peak_flops
from train.metrics import Counters, MetricsLog, Window, make_record
from train.prepare import Prepared
from train.schedule import learning_rate
from train.stop import StopWish

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the loop works with."""

    prepared: Prepared
    ranks: Ranks
    engine: Any
    feed: Feed
    cost: ModelCost
    log: MetricsLog | None
    """On rank 0."""
    wish: StopWish


def train(parts: Parts, start: TrainState) -> None:
    """Run the steps after `start.step` to the end. Raises StoppedOnRequest, with the state saved, if asked to stop."""
    recipe, total_steps = parts.prepared.recipe, parts.prepared.order.total_steps
    counters = start.counters
    window = _resumed_window(start, parts.ranks)
    fetch_started = time.perf_counter()
    for batch in parts.feed.steps(start.step):
        data_seconds = time.perf_counter() - fetch_started
        rate = learning_rate(
            batch.step, peak=recipe.optim.learning_rate, schedule=recipe.schedule, total_steps=total_steps
        )
        # ------------------------------------------------------------------------------------------------
        loss = accumulate(parts.engine, batch.micro_batches, parts.ranks)
        _update(parts, batch, rate)
        step = batch.step + 1
        window.add(batch, loss, data_seconds=data_seconds)
        counters.tokens += batch.num_tokens
        counters.positions += batch.num_positions
        counters.loss_tokens += batch.num_loss_tokens
        # ------------------------------------------------------------------------------------------------
        is_last = step == total_steps
        if is_last or step % recipe.log.every_steps == 0:
            _log(parts, window, counters, step=step, rate=rate)
            window = Window()
        stopping = not is_last and _should_stop(parts, steps_done=step - start.step)
        if is_last or stopping or step % recipe.checkpoint.every_steps == 0:
            saving_started = time.perf_counter()
            losses = window.global_losses(parts.ranks)
            saved = _save(parts, TrainState(step=step, counters=counters, window_losses=losses))
            window.started += time.perf_counter() - saving_started  # a save is no part of the speed of training
            if stopping:
                raise StoppedOnRequest(
                    f"stopped after step {step} of {total_steps}, saved in {saved}; run the same command again to go on"
                )
        if step == start.step + 1:
            gc.collect()
            gc.freeze()  # what lives now lives to the end: later collections, and the stalls they cause, stay small
        fetch_started = time.perf_counter()


def _update(parts: Parts, batch: StepBatch, rate: float) -> None:
    try:
        update(parts.engine, learning_rate=rate)
    except DataError as exc:
        raise DataError(
            f"step {batch.step + 1}: {exc}. {_held(parts, batch)}; lower optim.learning_rate, or look at them"
        ) from exc


def _held(parts: Parts, batch: StepBatch) -> str:
    """What the step holds, in the words of `sft-prep inspect`."""
    if batch.unit == "pack":
        names, option = [str(pack_id) for pack_id in batch.ids], "--pack N"
    else:
        sources = parts.prepared.shard_set.manifest.sources
        rows = [pack.seq_origin[0] for pack in parts.feed.plan(batch.step).packs]
        names, option = [f"{sources[source].name}:{row}" for source, row, _ in rows], "--row SOURCE:ROW"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"Its {batch.unit}s: {', '.join(names[:8])}{more} (sft-prep inspect {parts.feed.shard_set.path} {option})"


def _log(parts: Parts, window: Window, counters: Counters, *, step: int, rate: float) -> None:
    losses = window.global_losses(parts.ranks)
    if not all(math.isfinite(loss) for loss in losses):
        raise DataError(f"step {step}: the loss is not finite, though the gradients were; lower optim.learning_rate")
    if parts.log is None:
        return
    peak = peak_flops(parts.ranks.device)
    record = {
        "step": step,
        "epoch": parts.prepared.order.epoch_after(step),
        "learning_rate": rate,
        "grad_norm": float(parts.engine.get_global_grad_norm()),
        **make_record(window, losses, counters, ranks=parts.ranks, cost=parts.cost, peak=peak),
    }
    parts.log.write(record, total_steps=parts.prepared.order.total_steps)


def _save(parts: Parts, state: TrainState) -> Path:
    return save_checkpoint(
        parts.engine,
        state,
        run=parts.prepared.run,
        ranks=parts.ranks,
        identity=parts.prepared.identity,
        keep_last=parts.prepared.recipe.checkpoint.keep_last,
    )


def _should_stop(parts: Parts, *, steps_done: int) -> bool:
    """All ranks give the same answer: one that was asked alone takes the others with it."""
    stop_after = parts.prepared.request.stop_after
    wished = parts.wish.signal_name is not None or (stop_after is not None and steps_done >= stop_after)
    return any_rank(wished, parts.ranks)


def _resumed_window(start: TrainState, ranks: Ranks) -> Window:
    """Rank 0 brings back the losses that were logged by no record yet; they are sums over ranks already."""
    share = 1.0 if ranks.is_main else 0.0
    losses = [torch.tensor([loss * share], dtype=torch.float32, device=ranks.device) for loss in start.window_losses]
    return Window(losses=losses)
