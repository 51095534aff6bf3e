"""The training loop: fetch, forward and backward, update, log, save, evaluate; one step a pass.

The host runs ahead of the device. It waits only where a record is logged, a checkpoint is saved or
an evaluation runs (train/loop/metrics_window.py); under ZeRO DeepSpeed waits in every update.
"""

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
from train.engine.engine import accumulate, is_skipped, update
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
    """What computes the steps and the evaluations."""

    engine: Any
    cost: ModelCost
    loader: StepLoader
    eval_loader: EvalLoader | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reports:
    """Where a run reports to."""

    log: MetricsLog
    spikes: SpikeLog


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """What the loop works with."""

    prepared: Prepared
    ranks: Ranks
    training: Training
    reports: Reports | None
    """None on all ranks but rank 0."""
    pusher: Pusher | None
    """None on all ranks but rank 0."""
    stop_request: StopRequest
    watchdog: Watchdog


def train(context: RunContext, start: TrainState) -> None:
    """Run the steps after `start.step` to the end of the run.

    Raises StoppedOnRequest, with the state saved, on a request to stop.
    """
    prepared, training, ranks = context.prepared, context.training, context.ranks
    recipe, total_steps = prepared.recipe, prepared.order.total_steps
    peak, schedule = recipe.optim.learning_rate, recipe.schedule
    num_sources = len(training.loader.shard_set.manifest.sources)
    counters = start.counters
    _finish_interrupted_save(context, start)
    window = open_window(num_sources, ranks, start.window)
    fetch_started = time.perf_counter()
    for batch in training.loader.steps(start.step):
        data_seconds = time.perf_counter() - fetch_started

        # Compute. The rate depends on nothing but the number of the step, so a resumed run needs no
        # scheduler state.
        rate = learning_rate(batch.step, peak=peak, schedule=schedule, total_steps=total_steps)
        window.add(_run_step(context, batch, rate=rate), data_seconds=data_seconds)
        counters.add(batch)
        # Batches are numbered from 0; records and checkpoints count the updates done.
        step = batch.step + 1
        is_last = step == total_steps

        # Report. A record closes the window that it is made from.
        if is_last or step % recipe.log.every_steps == 0:
            _log(context, window, counters, step=step, rate=rate)
            window = open_window(num_sources, ranks)
        elif is_skipped(training.engine):
            # ZeRO has told the host already: decide now whether the run may go on without the step.
            _read(context, window, counters)

        # Decide what else this step does. A signal may reach one rank only, and all ranks have to
        # stop after the same step.
        stop_after = prepared.request.stop_after
        wants_stop = context.stop_request.is_set() or step - start.step == stop_after
        stopping = not is_last and any_rank(wants_stop, ranks)
        saving = is_last or stopping or step % recipe.checkpoint.every_steps == 0
        evaluating = _needs_evaluation(context, step)
        # A checkpoint holds the open window, so that a resumed run logs what this one would have.
        # And weights are neither saved nor evaluated before every step so far is known to be good.
        sums = _read(context, window, counters) if saving or evaluating else None

        # Save, evaluate, push: in this order, so that a stop finds its checkpoint and the pushed
        # checkpoint holds its evaluation loss.
        pause_started = time.perf_counter()
        saved = None
        if saving:
            saved = _save(context, TrainState(step=step, counters=counters, window=sums))
            if stopping or is_last:
                context.stop_request.clear()
            if stopping:
                raise StoppedOnRequest(
                    f"stopped after step {step} of {total_steps}, saved in {saved}; run the same"
                    " command again to resume"
                )
        if evaluating:
            _evaluate(context, step, saved)
        if saved is not None and context.pusher is not None:
            context.pusher.push(saved)
        # A pause to save or evaluate does not count in the training speed.
        window.started += time.perf_counter() - pause_started

        if step == start.step + 1:
            # What lives after the first step lives to the end. Frozen, it is not searched again by
            # each collection, whose pause on one rank would keep all the others waiting.
            gc.collect()
            gc.freeze()
        context.watchdog.step_ended()
        fetch_started = time.perf_counter()


def _finish_interrupted_save(context: RunContext, start: TrainState) -> None:
    """Do what an interrupted run still owed its last checkpoint: evaluate it, then push it."""
    path, checkpoints = context.prepared.resume_from, context.prepared.run.checkpoints
    if path is not None and path.parent.resolve() != checkpoints.resolve():
        # --resume may start a new run from a checkpoint of another one, which stays as it is.
        path = None
    if start.step and start.eval_loss is None and _needs_evaluation(context, start.step):
        _evaluate(context, start.step, path)
    if context.pusher is not None and path is not None:
        context.pusher.push(path)


def _run_step(context: RunContext, batch: StepBatch, *, rate: float) -> StepResult:
    """Run forward and backward passes and the update, without waiting for the device."""
    training, ranks = context.training, context.ranks
    num_sources = len(training.loader.shard_set.manifest.sources)
    source_totals = empty_totals(num_sources, ranks.device)
    balancing = None
    if context.prepared.recipe.loss.load_balancing_weight:
        balancing = torch.zeros(1, device=ranks.device)
    losses = accumulate(training.engine, batch.micro_batches, ranks, source_totals, balancing)
    skipped = update(training.engine, learning_rate=rate)
    return StepResult(
        batch=batch,
        losses=losses,
        source_totals=source_totals,
        balancing=balancing,
        skipped=skipped,
        grad_norm=training.engine.get_global_grad_norm(),
    )


def _read(context: RunContext, window: MetricsWindow, counters: Counters) -> WindowSums:
    """Return the sums of the window, once every step in it is known to be good or may be skipped.

    Raises DataError for any other step.
    """
    sums, skipped = window.read(context.ranks)
    for result in skipped:
        counters.skipped_steps += 1
        handle_non_finite_step(
            result.batch,
            result.losses,
            config=context.prepared.recipe.run,
            skipped_steps=counters.skipped_steps,
            loader=context.training.loader,
            ranks=context.ranks,
        )
    for step, loss in zip(window.loss_steps, window.losses, strict=True):
        if not math.isfinite(loss):
            raise DataError(
                f"step {step}: the loss is not finite, although the gradients were; lower"
                " optim.learning_rate"
            )
    return sums


def _log(
    context: RunContext, window: MetricsWindow, counters: Counters, *, step: int, rate: float
) -> None:
    """Write the record of the window and report its loss spikes."""
    sums = _read(context, window, counters)
    if context.reports is None:
        return
    order, training, ranks = context.prepared.order, context.training, context.ranks
    manifest, peak = training.loader.shard_set.manifest, peak_flops(ranks.device)
    record = {
        "step": step,
        "epoch": order.epoch_after(step),
        "learning_rate": rate,
        **make_record(window, sums, counters, ranks=ranks, cost=training.cost, peak=peak),
        **means("train_loss", sums.source_losses, sums.source_tokens, manifest),
    }
    context.reports.log.write(record, total_steps=order.total_steps)
    context.reports.spikes.check(window.loss_steps, window.losses, training.loader)


def _save(context: RunContext, state: TrainState) -> Path:
    """Save a checkpoint; the one that is being pushed outlives the limit on old ones."""
    with context.watchdog.paused(), library_writing_to(context.prepared.run.path):
        return save_checkpoint(
            context.training.engine,
            state,
            run=context.prepared.run,
            ranks=context.ranks,
            identity=context.prepared.identity,
            keep_last=context.prepared.recipe.checkpoint.keep_last,
            in_use=None if context.pusher is None else context.pusher.busy_with(),
        )


def _needs_evaluation(context: RunContext, step: int) -> bool:
    """Return whether the weights after `step` steps are to be evaluated."""
    recipe, order = context.prepared.recipe, context.prepared.order
    every = recipe.eval.every_steps or recipe.checkpoint.every_steps
    is_due = step == order.total_steps or step % every == 0
    return is_due and context.training.eval_loader is not None


def _evaluate(context: RunContext, step: int, saved: Path | None) -> None:
    """Evaluate the weights after `step` steps; `saved` is their checkpoint, if there is one."""
    assert context.training.eval_loader is not None
    with context.watchdog.paused():
        result = evaluate(context.training.engine, context.training.eval_loader, context.ranks)
    if context.reports is None:
        return
    epoch = context.prepared.order.epoch_after(step)
    context.reports.log.write_eval({"step": step, "epoch": epoch, **result})
    if saved is not None:
        record_eval_loss(saved, result["eval_loss"])
