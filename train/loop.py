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
from train.by_source import empty_totals, means
from train.checkpoint import TrainState, record_eval_loss, save_checkpoint
from train.distributed import Ranks, any_rank
from train.engine import accumulate, update
from train.evaluate import EvalFeed, evaluate
from train.feed import Feed, StepBatch
from train.flops import ModelCost, peak_flops
from train.metrics import Counters, MetricsLog, Window, make_record, open_window
from train.not_finite import judge_refused_update
from train.prepare import Prepared
from train.schedule import learning_rate
from train.spikes import SpikeLog
from train.stop import StopWish
from train.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the loop works with."""

    prepared: Prepared
    ranks: Ranks
    engine: Any
    feed: Feed
    eval_feed: EvalFeed | None
    cost: ModelCost
    log: MetricsLog | None
    """On rank 0."""
    spikes: SpikeLog | None
    """On rank 0."""
    wish: StopWish
    watchdog: Watchdog


def train(parts: Parts, start: TrainState) -> None:
    """Run the steps after `start.step` to the end. Raises StoppedOnRequest, with the state saved, if asked to stop."""
    recipe, total_steps = parts.prepared.recipe, parts.prepared.order.total_steps
    counters = start.counters
    num_sources = len(parts.feed.shard_set.manifest.sources)
    if start.step and start.eval_loss is None and _is_due(parts, start.step):
        _evaluate(parts, start.step, _own_checkpoint(parts.prepared))  # saved, then stopped or killed before it was
    window = open_window(num_sources, parts.ranks, start.window)
    fetch_started = time.perf_counter()
    for batch in parts.feed.steps(start.step):
        data_seconds = time.perf_counter() - fetch_started
        rate = learning_rate(
            batch.step, peak=recipe.optim.learning_rate, schedule=recipe.schedule, total_steps=total_steps
        )
        # ------------------------------------------------------------------------------------------------
        source_totals = empty_totals(num_sources, parts.ranks.device)
        balancing = torch.zeros(1, device=parts.ranks.device) if recipe.loss.load_balancing_weight else None
        losses = accumulate(parts.engine, batch.micro_batches, parts.ranks, source_totals, balancing)
        is_updated = _update(parts, batch, losses, counters, rate=rate)
        step = batch.step + 1
        window.add(batch, losses, source_totals, balancing, is_skipped=not is_updated, data_seconds=data_seconds)
        counters.tokens += batch.num_tokens
        counters.positions += batch.num_positions
        counters.loss_tokens += batch.num_loss_tokens
        # ------------------------------------------------------------------------------------------------
        is_last = step == total_steps
        if is_last or step % recipe.log.every_steps == 0:
            _log(parts, window, counters, step=step, rate=rate, is_updated=is_updated)
            window = open_window(num_sources, parts.ranks)
        stopping = not is_last and _should_stop(parts, steps_done=step - start.step)
        if is_last or stopping or step % recipe.checkpoint.every_steps == 0:
            pause_started = time.perf_counter()
            state = TrainState(step=step, counters=counters, window=window.sums(parts.ranks))
            saved = _save(parts, state)
            if stopping or is_last:
                parts.wish.granted()
            if stopping:
                raise StoppedOnRequest(
                    f"stopped after step {step} of {total_steps}, saved in {saved}; run the same command again to go on"
                )
            window.started += time.perf_counter() - pause_started  # a save is no part of the speed of training
        else:
            saved = None
        if _is_due(parts, step):
            pause_started = time.perf_counter()
            _evaluate(parts, step, saved)
            window.started += time.perf_counter() - pause_started
        if step == start.step + 1:
            gc.collect()
            gc.freeze()  # what lives now lives to the end: later collections, and the stalls they cause, stay small
        parts.watchdog.step_ended()
        fetch_started = time.perf_counter()


def _update(parts: Parts, batch: StepBatch, losses: torch.Tensor, counters: Counters, *, rate: float) -> bool:
    """Return whether the weights were updated: not if a gradient was not finite and the step may be left out."""
    if update(parts.engine, learning_rate=rate):
        return True
    counters.skipped_steps += 1
    judge_refused_update(
        batch,
        losses,
        config=parts.prepared.recipe.run,
        skipped_steps=counters.skipped_steps,
        feed=parts.feed,
        ranks=parts.ranks,
    )
    return False


def _log(parts: Parts, window: Window, counters: Counters, *, step: int, rate: float, is_updated: bool) -> None:
    sums = window.sums(parts.ranks)
    if not all(math.isfinite(loss) for loss in sums.losses):
        raise DataError(f"step {step}: the loss is not finite, though the gradients were; lower optim.learning_rate")
    if parts.log is None or parts.spikes is None:
        return
    peak = peak_flops(parts.ranks.device)
    record = {
        "step": step,
        "epoch": parts.prepared.order.epoch_after(step),
        "learning_rate": rate,
        "grad_norm": float(parts.engine.get_global_grad_norm()) if is_updated else None,
        **make_record(window, sums, counters, ranks=parts.ranks, cost=parts.cost, peak=peak),
        **means("train_loss", sums.source_losses, sums.source_tokens, parts.feed.shard_set.manifest),
    }
    parts.log.write(record, total_steps=parts.prepared.order.total_steps)
    own_losses = sums.losses[len(sums.losses) - len(window.loss_steps) :]  # without those that a checkpoint carried
    parts.spikes.look_at(window.loss_steps, own_losses, parts.feed)


def _save(parts: Parts, state: TrainState) -> Path:
    with parts.watchdog.resting():
        return save_checkpoint(
            parts.engine,
            state,
            run=parts.prepared.run,
            ranks=parts.ranks,
            identity=parts.prepared.identity,
            keep_last=parts.prepared.recipe.checkpoint.keep_last,
        )


def _is_due(parts: Parts, step: int) -> bool:
    """Return whether the weights after `step` steps are to be evaluated."""
    recipe, order = parts.prepared.recipe, parts.prepared.order
    every = recipe.eval.every_steps or recipe.checkpoint.every_steps
    return parts.eval_feed is not None and (step == order.total_steps or step % every == 0)


def _own_checkpoint(prepared: Prepared) -> Path | None:
    """Return the checkpoint that the run went on from, unless it belongs to another run."""
    path = prepared.resume_from
    return path if path is not None and path.parent.resolve() == prepared.run.checkpoints.resolve() else None


def _evaluate(parts: Parts, step: int, saved: Path | None) -> None:
    """Evaluate the weights after `step` steps, which lie in the checkpoint `saved`, if any: already safe by now."""
    assert parts.eval_feed is not None
    with parts.watchdog.resting():
        result = evaluate(parts.engine, parts.eval_feed, parts.ranks)
    if parts.log is None:
        return
    parts.log.write_eval({"step": step, "epoch": parts.prepared.order.epoch_after(step), **result})
    if saved is not None:
        record_eval_loss(saved, result["eval_loss"])


def _should_stop(parts: Parts, *, steps_done: int) -> bool:
    """All ranks give the same answer: one that was asked alone takes the others with it."""
    stop_after = parts.prepared.request.stop_after
    wished = parts.wish.is_there() or (stop_after is not None and steps_done >= stop_after)
    return any_rank(wished, parts.ranks)
