"""The training loop: plan and fetch, forward and backward, update, log, checkpoint; in that order,
one step a turn."""

import gc
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.disk import library_writing_to
from shared.errors import DataError, StoppedOnRequest
from train.checkpoint.checkpoint import record_eval_loss, save_checkpoint
from train.data.loader import Feed, StepBatch
from train.engine.engine import accumulate, is_refused, update
from train.engine.process_group import Ranks, any_rank
from train.loop.evaluate import EvalFeed, evaluate
from train.loop.loss_spikes import SpikeLog
from train.loop.metrics import MetricsLog, make_record
from train.loop.metrics_window import StepResult, Window, open_window
from train.loop.non_finite import judge_refused_update
from train.loop.schedule import learning_rate
from train.loop.watchdog import Watchdog
from train.model.source_loss import empty_totals, means
from train.publish.background_push import Pusher
from train.run.prepare import Prepared
from train.run.stop_request import StopWish
from train.run.train_state import Counters, TrainState, WindowSums
from train.sizing.flops import ModelCost, peak_flops

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
    pusher: Pusher | None
    """On rank 0."""
    wish: StopWish
    watchdog: Watchdog


def train(parts: Parts, start: TrainState) -> None:
    """Run the steps after `start.step` to the end. Raises StoppedOnRequest, with the state saved,
    if asked to stop."""
    recipe, total_steps = parts.prepared.recipe, parts.prepared.order.total_steps
    counters = start.counters
    num_sources = len(parts.feed.shard_set.manifest.sources)
    _make_up(parts, start)
    window = open_window(num_sources, parts.ranks, start.window)
    fetch_started = time.perf_counter()
    for batch in parts.feed.steps(start.step):
        data_seconds = time.perf_counter() - fetch_started
        rate = learning_rate(
            batch.step,
            peak=recipe.optim.learning_rate,
            schedule=recipe.schedule,
            total_steps=total_steps,
        )
        window.add(_run_step(parts, batch, rate=rate), data_seconds=data_seconds)
        counters.add(batch)
        step = batch.step + 1
        is_last = step == total_steps
        if is_last or step % recipe.log.every_steps == 0:
            _log(parts, window, counters, step=step, rate=rate)
            window = open_window(num_sources, parts.ranks)
        elif is_refused(parts.engine):
            _read(parts, window, counters)
        stopping = not is_last and _should_stop(parts, steps_done=step - start.step)
        saves = is_last or stopping or step % recipe.checkpoint.every_steps == 0
        evaluates = _is_due(parts, step)
        sums = _read(parts, window, counters) if saves or evaluates else None
        saved = None
        pause_started = time.perf_counter()
        if saves:
            saved = _save(parts, TrainState(step=step, counters=counters, window=sums))
            if stopping or is_last:
                parts.wish.granted()
            if stopping:
                raise StoppedOnRequest(
                    f"stopped after step {step} of {total_steps}, saved in {saved}; run the same"
                    " command again to go on"
                )
        if evaluates:
            _evaluate(parts, step, saved)
        if saved is not None and parts.pusher is not None:
            parts.pusher.push(saved)  # with its evaluation loss
        window.started += (
            time.perf_counter() - pause_started
        )  # such a pause is no part of the speed of training
        if step == start.step + 1:
            gc.collect()
            gc.freeze()  # what lives now lives to the end: later collections, and the stalls they cause, stay small
        parts.watchdog.step_ended()
        fetch_started = time.perf_counter()


def _run_step(parts: Parts, batch: StepBatch, *, rate: float) -> StepResult:
    """Run forward and backward passes and the update, without waiting for the device."""
    device = parts.ranks.device
    source_totals = empty_totals(len(parts.feed.shard_set.manifest.sources), device)
    balancing = (
        torch.zeros(1, device=device) if parts.prepared.recipe.loss.load_balancing_weight else None
    )
    losses = accumulate(parts.engine, batch.micro_batches, parts.ranks, source_totals, balancing)
    refused = update(parts.engine, learning_rate=rate)
    return StepResult(
        batch=batch,
        losses=losses,
        source_totals=source_totals,
        balancing=balancing,
        refused=refused,
        grad_norm=parts.engine.get_global_grad_norm(),
    )


def _read(parts: Parts, window: Window, counters: Counters) -> WindowSums:
    """Return the sums of the window; raise DataError if it holds refused steps that may not be left
    out."""
    sums, refused = window.read(parts.ranks)
    own_losses = sums.losses[
        len(sums.losses) - len(window.loss_steps) :
    ]  # without those that a checkpoint carried
    for result in refused:
        counters.skipped_steps += 1
        judge_refused_update(
            result.batch,
            result.losses,
            config=parts.prepared.recipe.run,
            skipped_steps=counters.skipped_steps,
            feed=parts.feed,
            ranks=parts.ranks,
        )
    for step, loss in zip(window.loss_steps, own_losses, strict=True):
        if not math.isfinite(loss):
            raise DataError(
                f"step {step}: the loss is not finite, though the gradients were; lower"
                " optim.learning_rate"
            )
    return sums


def _log(parts: Parts, window: Window, counters: Counters, *, step: int, rate: float) -> None:
    sums = _read(parts, window, counters)
    if parts.log is None or parts.spikes is None:
        return
    peak = peak_flops(parts.ranks.device)
    record = {
        "step": step,
        "epoch": parts.prepared.order.epoch_after(step),
        "learning_rate": rate,
        **make_record(window, sums, counters, ranks=parts.ranks, cost=parts.cost, peak=peak),
        **means(
            "train_loss", sums.source_losses, sums.source_tokens, parts.feed.shard_set.manifest
        ),
    }
    parts.log.write(record, total_steps=parts.prepared.order.total_steps)
    own_losses = sums.losses[
        len(sums.losses) - len(window.loss_steps) :
    ]  # without those that a checkpoint carried
    parts.spikes.look_at(window.loss_steps, own_losses, parts.feed)


def _save(parts: Parts, state: TrainState) -> Path:
    with parts.watchdog.resting(), library_writing_to(parts.prepared.run.path):
        return save_checkpoint(
            parts.engine,
            state,
            run=parts.prepared.run,
            ranks=parts.ranks,
            identity=parts.prepared.identity,
            keep_last=parts.prepared.recipe.checkpoint.keep_last,
            in_use=None if parts.pusher is None else parts.pusher.busy_with(),
        )


def _is_due(parts: Parts, step: int) -> bool:
    """Return whether the weights after `step` steps are to be evaluated."""
    recipe, order = parts.prepared.recipe, parts.prepared.order
    every = recipe.eval.every_steps or recipe.checkpoint.every_steps
    return parts.eval_feed is not None and (step == order.total_steps or step % every == 0)


def _make_up(parts: Parts, start: TrainState) -> None:
    """Do with the checkpoint that the run goes on from what comes after a save: it may have ended
    before that."""
    own = _own_checkpoint(parts.prepared)
    if start.step and start.eval_loss is None and _is_due(parts, start.step):
        _evaluate(parts, start.step, own)
    if parts.pusher is not None and own is not None:
        parts.pusher.push(own)


def _own_checkpoint(prepared: Prepared) -> Path | None:
    """Return the checkpoint that the run went on from, unless it belongs to another run."""
    path = prepared.resume_from
    return (
        path
        if path is not None and path.parent.resolve() == prepared.run.checkpoints.resolve()
        else None
    )


def _evaluate(parts: Parts, step: int, saved: Path | None) -> None:
    """Evaluate the weights after `step` steps, which lie in the checkpoint `saved`, if any: already
    safe by now."""
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
