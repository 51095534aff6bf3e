"""One rank of a run, from an empty process to an exported model, with the loop in the middle."""

import contextlib
import faulthandler
import logging
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from shared import atomic, config
from train.checkpoint.checkpoint import load_checkpoint, remove_older, set_aside_newer
from train.data.loader import StepLoader
from train.engine.engine import (
    consolidated_weights,
)
from train.engine.process_group import Ranks, barrier, process_group
from train.loop import loop
from train.loop.evaluate import EvalLoader
from train.loop.loss_spikes import SpikeLog
from train.loop.metrics import MetricsLog
from train.loop.start import start_model
from train.loop.watchdog import Watchdog
from train.model.lora import adapted_by
from train.publish.background_push import push_the_rest, pushing
from train.publish.hub import check_access
from train.run.directory import describe, read_description, write_status
from train.run.hold import holding_run
from train.run.prepare import Prepared, check_ranks
from train.run.record_status import record_end, recorded_end
from train.run.records import read_records
from train.run.stop_request import StopRequest, watching_signals
from train.run.train_state import Counters, TrainState

logger = logging.getLogger(__name__)


def run_rank(prepared: Prepared) -> bool:
    """Train, or resume training, and export; return False where another start has completed the run
    meanwhile.

    Raises SftError, StoppedOnRequest among them, after status.json was written; only an error that
    denies this start the run leaves everything in its directory alone.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__ or 2)  # shows where a truncated shard file raised SIGBUS
    longest_wait = 2 * _patience(prepared) + timedelta(minutes=1)  # the watchdog speaks first
    with (
        watching_signals(prepared.run.stop) as stop_request,
        process_group(longest_wait) as ranks,
        holding_run(prepared, ranks) as decided,
    ):
        if decided is None:
            return False
        _train(decided, ranks, stop_request)
        return True


def _train(prepared: Prepared, ranks: Ranks, stop_request: StopRequest) -> None:
    """Do what `run_rank` does, with the run's lock held and `prepared` decided under it."""
    run = prepared.run
    with recorded_end(run), pushing(prepared.request, run, ranks) as pusher:
        check_ranks(prepared, ranks.world_size)
        if ranks.is_main:
            _open_run(prepared, ranks.world_size)
        barrier(ranks)
        engine, cost = start_model(prepared, ranks)
        start = _starting_state(prepared, engine, ranks)
        watchdog = Watchdog(
            limit_seconds=_patience(prepared).total_seconds(),
            stacks=run.stacks / f"rank-{ranks.rank}.txt",
            on_hang=lambda reason: record_end(run, "failed", exit_code=1, message=reason),
        )
        with _reporting(prepared, ranks, start) as reports, watchdog.watching():
            training = loop.Training(
                engine=engine,
                cost=cost,
                feed=_feed(prepared, ranks),
                eval_feed=_eval_feed(prepared, ranks),
            )
            context = loop.RunContext(
                prepared=prepared,
                ranks=ranks,
                training=training,
                reports=reports,
                pusher=pusher,
                stop_request=stop_request,
                watchdog=watchdog,
            )
            loop.train(context, start)
        _finish(prepared, engine, ranks)
        push_the_rest(pusher, ranks, stop_request)
        _complete(prepared, ranks)


def _patience(prepared: Prepared) -> timedelta:
    return timedelta(minutes=prepared.recipe.run.hang_timeout_minutes)


def _feed(prepared: Prepared, ranks: Ranks) -> StepLoader:
    recipe = prepared.recipe
    return StepLoader(
        shard_set=prepared.shard_set,
        order=prepared.order,
        loss=recipe.loss,
        rank=ranks.rank,
        world_size=ranks.world_size,
        packs_per_micro_batch=recipe.batch.packs_per_micro_batch,
        sequence_parallel=recipe.engine.sequence_parallel,
    )


def _starting_state(prepared: Prepared, engine: Any, ranks: Ranks) -> TrainState:
    if prepared.resume_from is None:
        return TrainState(step=0, counters=Counters(), window=None)
    state = load_checkpoint(
        engine, prepared.resume_from, run=prepared.run, ranks=ranks, seed=prepared.recipe.run.seed
    )
    if ranks.is_main:
        set_aside_newer(prepared.run, prepared.resume_from)
    logger.info("going on after step %d, from %s", state.step, prepared.resume_from)
    return state


def _open_run(prepared: Prepared, world_size: int) -> None:
    """Write what the run is, on rank 0, holding its lock."""
    run, request = prepared.run, prepared.request
    for repo in {request.push_checkpoints, request.push_to_hub}:
        if repo is not None:
            check_access(repo)  # or days of training would end with a name that does not exist
    atomic.remove_leftovers(run.path, r"model|\w+\.(?:json|jsonl|png)")
    atomic.remove_leftovers(run.checkpoints, r"(?:universal-)?step|step-\d+")
    old = read_description(run)
    description = describe(
        prepared.recipe, prepared.shard_set, prepared.order, world_size=world_size
    )
    if old is not None:
        description["wandb_id"] = old["wandb_id"]
    atomic.write_json(run.config, description)


def _eval_feed(prepared: Prepared, ranks: Ranks) -> EvalLoader | None:
    if prepared.eval_set is None:
        return None
    recipe = prepared.recipe
    feed = EvalLoader(
        shard_set=prepared.eval_set,
        max_packs=recipe.eval.max_packs,
        rank=ranks.rank,
        world_size=ranks.world_size,
        packs_per_micro_batch=recipe.batch.packs_per_micro_batch,
        sequence_parallel=recipe.engine.sequence_parallel,
    )
    logger.info("evaluating on %s: %d packs", prepared.eval_set.path, len(feed.pack_ids()))
    return feed


@contextlib.contextmanager
def _reporting(
    prepared: Prepared, ranks: Ranks, start: TrainState
) -> Iterator[loop.Reports | None]:
    """Give what the run reports through, on rank 0."""
    if not ranks.is_main:
        yield None
        return
    run, recipe = prepared.run, prepared.recipe
    description = read_description(run)
    assert description is not None
    log = MetricsLog(
        run.metrics,
        config=recipe.log,
        run_name=run.path.name,
        wandb_id=description["wandb_id"],
        recipe=config.to_plain(recipe),
        after_step=start.step,
        is_evaluated=start.eval_loss is not None,
    )
    try:
        spikes = SpikeLog(run.spikes, sigma=recipe.log.spike_sigma, after_step=start.step)
        yield loop.Reports(log=log, spikes=spikes)
    finally:
        log.close()


def _finish(prepared: Prepared, engine: Any, ranks: Ranks) -> None:
    """Export the model and draw the loss; the tokenizer is first read here."""
    weights = consolidated_weights(engine)
    if ranks.is_main:
        from train.publish.export import export_model
        from train.publish.model_card import card_facts
        from train.results.plot import plot_runs

        run = prepared.run
        description = read_description(run)
        assert description is not None
        records = read_records(run.metrics)
        plot_runs([run.path], run.plot)
        export_model(
            state_dict=weights,
            model_config=engine.module.model.config,
            shard_set=prepared.shard_set,
            card=card_facts(description, prepared.shard_set.manifest, records),
            out_dir=run.model,
            adapted=adapted_by(prepared.recipe),
            plot=run.plot,
            replace=True,
        )
    barrier(ranks)


def _complete(prepared: Prepared, ranks: Ranks) -> None:
    run, steps = prepared.run, prepared.order.total_steps
    if ranks.is_main:
        remove_older(run, keep_last=prepared.recipe.checkpoint.keep_last)
        write_status(
            run, "complete", exit_code=0, message=f"trained {steps} steps, model in {run.model}"
        )
        logger.info("done: %d steps, model in %s, loss in %s", steps, run.model, run.plot)
