"""The training loop: fetch, forward and backward, update, log, checkpoint; one step a turn."""

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
from train.data.loader import StepBatch, StepLoader
from train.engine.engine import accumulate, is_refused, update
from train.engine.process_group import Ranks, any_rank
from train.loop.evaluate import EvalLoader, evaluate
from train.loop.loss_spikes import SpikeLog
from train.loop.metrics import MetricsLog, make_record
from train.loop.metrics_window import MetricsWindow, StepResult, open_window
from train.loop.non_finite import handle_non_finite_step
from train.loop.schedule import learning_rate
from train.loop.watchdog import Watchdog
from train.model.source_loss import empty_totals, means
from train.publish.background_push import Pusher
from train.run.prepare import Prepared
from train.run.stop_request import StopRequest
from train.run.train_state import Counters, TrainState, WindowSums
from train.sizing.flops import ModelCost, peak_flops

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What steps and evaluations are computed with."""

    engine: Any
    cost: ModelCost
    feed: StepLoader
    eval_feed: EvalLoader | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reports:
    """What a run reports through."""

    log: MetricsLog
    spikes: SpikeLog


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """What the loop works with."""

    prepared: Prepared
    ranks: Ranks
    training: Training
    reports: Reports | None
    """On rank 0."""
    pusher: Pusher | None
    """On rank 0."""
    stop_request: StopRequest
    watchdog: Watchdog


def train(context: RunContext, start: TrainState) -> None:
    """Run the steps after `start.step` to the end. Raises StoppedOnRequest, with the state
    saved, on a request to stop."""
    recipe, total_steps = context.prepared.recipe, context.prepared.order.total_steps
    counters = start.counters
    num_sources = len(context.training.feed.shard_set.manifest.sources)
    _finish_interrupted_save(context, start)
    window = open_window(num_sources, context.ranks, start.window)
    fetch_started = time.perf_counter()
    for batch in context.training.feed.steps(start.step):
        data_seconds = time.perf_counter() - fetch_started
        rate = learning_rate(
            batch.step,
            peak=recipe.optim.learning_rate,
            schedule=recipe.schedule,
            total_steps=total_steps,
        )
        window.add(_run_step(context, batch, rate=rate), data_seconds=data_seconds)
        counters.add(batch)
        step = batch.step + 1
        is_last = step == total_steps
        if is_last or step % recipe.log.every_steps == 0:
            _log(context, window, counters, step=step, rate=rate)
            window = open_window(num_sources, context.ranks)
        elif is_refused(context.training.engine):
            _read(context, window, counters)
        stopping = not is_last and _should_stop(context, steps_done=step - start.step)
        saves = is_last or stopping or step % recipe.checkpoint.every_steps == 0
        evaluates = _is_due(context, step)
        sums = _read(context, window, counters) if saves or evaluates else None
        saved = None
        pause_started = time.perf_counter()
        if saves:
            saved = _save(context, TrainState(step=step, counters=counters, window=sums))
            if stopping or is_last:
                context.stop_request.clear()
            if stopping:
                raise StoppedOnRequest(
                    f"stopped after step {step} of {total_steps}, saved in {saved}; run the same"
                    " command again to go on"
                )
        if evaluates:
            _evaluate(context, step, saved)
        if saved is not None and context.pusher is not None:
            context.pusher.push(saved)  # with its evaluation loss
        # a pause to save or evaluate is no part of the training speed
        window.started += time.perf_counter() - pause_started
        if step == start.step + 1:
            # what lives now lives to the end: frozen, it keeps later collections and stalls small
            gc.collect()
            gc.freeze()
        context.watchdog.step_ended()
        fetch_started = time.perf_counter()


def _run_step(context: RunContext, batch: StepBatch, *, rate: float) -> StepResult:
    """Run forward and backward passes and the update, without waiting for the device."""
    device = context.ranks.device
    source_totals = empty_totals(len(context.training.feed.shard_set.manifest.sources), device)
    balancing = (
        torch.zeros(1, device=device)
        if context.prepared.recipe.loss.load_balancing_weight
        else None
    )
    losses = accumulate(
        context.training.engine, batch.micro_batches, context.ranks, source_totals, balancing
    )
    refused = update(context.training.engine, learning_rate=rate)
    return StepResult(
        batch=batch,
        losses=losses,
        source_totals=source_totals,
        balancing=balancing,
        refused=refused,
        grad_norm=context.training.engine.get_global_grad_norm(),
    )


def _read(context: RunContext, window: MetricsWindow, counters: Counters) -> WindowSums:
    """Return the sums of the window. Raises DataError if it holds a refused step that may not be
    skipped."""
    sums, refused = window.read(context.ranks)
    # without those of an earlier call, which the checkpoint holds
    losses = sums.losses[len(sums.losses) - len(window.loss_steps) :]
    for result in refused:
        counters.skipped_steps += 1
        handle_non_finite_step(
            result.batch,
            result.losses,
            config=context.prepared.recipe.run,
            skipped_steps=counters.skipped_steps,
            feed=context.training.feed,
            ranks=context.ranks,
        )
    for step, loss in zip(window.loss_steps, losses, strict=True):
        if not math.isfinite(loss):
            raise DataError(
                f"step {step}: the loss is not finite, though the gradients were; lower"
                " optim.learning_rate"
            )
    return sums


def _log(
    context: RunContext, window: MetricsWindow, counters: Counters, *, step: int, rate: float
) -> None:
    sums = _read(context, window, counters)
    if context.reports is None:
        return
    peak = peak_flops(context.ranks.device)
    record = {
        "step": step,
        "epoch": context.prepared.order.epoch_after(step),
        "learning_rate": rate,
        **make_record(
            window, sums, counters, ranks=context.ranks, cost=context.training.cost, peak=peak
        ),
        **means(
            "train_loss",
            sums.source_losses,
            sums.source_tokens,
            context.training.feed.shard_set.manifest,
        ),
    }
    context.reports.log.write(record, total_steps=context.prepared.order.total_steps)
    # without those of an earlier call, which the checkpoint holds
    losses = sums.losses[len(sums.losses) - len(window.loss_steps) :]
    context.reports.spikes.look_at(window.loss_steps, losses, context.training.feed)


def _save(context: RunContext, state: TrainState) -> Path:
    with context.watchdog.resting(), library_writing_to(context.prepared.run.path):
        return save_checkpoint(
            context.training.engine,
            state,
            run=context.prepared.run,
            ranks=context.ranks,
            identity=context.prepared.identity,
            keep_last=context.prepared.recipe.checkpoint.keep_last,
            in_use=None if context.pusher is None else context.pusher.busy_with(),
        )


def _is_due(context: RunContext, step: int) -> bool:
    """Return whether the weights after `step` steps are to be evaluated."""
    recipe, order = context.prepared.recipe, context.prepared.order
    every = recipe.eval.every_steps or recipe.checkpoint.every_steps
    return context.training.eval_feed is not None and (
        step == order.total_steps or step % every == 0
    )


def _finish_interrupted_save(context: RunContext, start: TrainState) -> None:
    """Finish the evaluation and the push that an interrupted run owed its last checkpoint."""
    own = _own_checkpoint(context.prepared)
    if start.step and start.eval_loss is None and _is_due(context, start.step):
        _evaluate(context, start.step, own)
    if context.pusher is not None and own is not None:
        context.pusher.push(own)


def _own_checkpoint(prepared: Prepared) -> Path | None:
    """Return the checkpoint that the run resumed from, unless it belongs to another run."""
    path = prepared.resume_from
    return (
        path
        if path is not None and path.parent.resolve() == prepared.run.checkpoints.resolve()
        else None
    )


def _evaluate(context: RunContext, step: int, saved: Path | None) -> None:
    """Evaluate the weights after `step` steps; `saved` is their checkpoint, if there is one."""
    assert context.training.eval_feed is not None
    with context.watchdog.resting():
        result = evaluate(context.training.engine, context.training.eval_feed, context.ranks)
    if context.reports is None:
        return
    context.reports.log.write_eval(
        {"step": step, "epoch": context.prepared.order.epoch_after(step), **result}
    )
    if saved is not None:
        record_eval_loss(saved, result["eval_loss"])


def _should_stop(context: RunContext, *, steps_done: int) -> bool:
    """Return the same answer on all ranks: a signal that only one of them got stops them all."""
    stop_after = context.prepared.request.stop_after
    wished = context.stop_request.is_set() or (stop_after is not None and steps_done >= stop_after)
    return any_rank(wished, context.ranks)
