"""One rank of a run, from an empty process to an exported model, with the loop in the middle.

`run_rank` joins the other ranks and takes the run's lock; `_train` is the walk from the first file
to the last: open the run, build the model, load the checkpoint, train, export, push, complete.
Every rank walks it; what writes files is done by rank 0 alone.
"""

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
from train.engine.engine import consolidated_weights
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
from train.sizing.flops import ModelCost

logger = logging.getLogger(__name__)


def run_rank(prepared: Prepared) -> bool:
    """Train or resume, and export. Return False if another start has completed the run meanwhile.

    Raises SftError, StoppedOnRequest among them, after status.json was written. Only an error that
    denies this start the run leaves everything in its directory alone.
    """
    if not faulthandler.is_enabled():
        # It shows where a shard file was read that had been cut short: the kernel sends SIGBUS.
        faulthandler.enable(sys.__stderr__ or 2)
    # Longer than the watchdog waits, which can say more about a hang than the process group can.
    timeout = timedelta(minutes=2 * prepared.recipe.run.hang_timeout_minutes + 1)
    with (
        watching_signals(prepared.run.stop) as stop_request,
        process_group(timeout) as ranks,
        holding_run(prepared, ranks) as decided,
    ):
        if decided is None:
            return False
        _train(decided, ranks, stop_request)
        return True


def _train(prepared: Prepared, ranks: Ranks, stop_request: StopRequest) -> None:
    """Walk through the run. Its lock is held, and `prepared` was decided under it."""
    run, recipe = prepared.run, prepared.recipe
    with recorded_end(run), pushing(prepared.request, run, ranks) as pusher:
        # Open the run: config.json is written before any rank reads it.
        check_ranks(prepared, ranks.world_size)
        if ranks.is_main:
            _open_run(prepared, ranks.world_size)
        barrier(ranks)

        # Build the model. A checkpoint replaces its weights, and says which step comes next.
        engine, cost = start_model(prepared, ranks)
        start = TrainState(step=0, counters=Counters(), window=None)
        if prepared.resume_from is not None:
            path = prepared.resume_from
            start = load_checkpoint(engine, path, run=run, ranks=ranks, seed=recipe.run.seed)
            if ranks.is_main:
                set_aside_newer(run, path)
            logger.info("resuming after step %d, from %s", start.step, path)

        # Train. Only rank 0 has reports and a pusher; every rank has a watchdog.
        watchdog = Watchdog(
            limit_seconds=60 * recipe.run.hang_timeout_minutes,
            stacks=run.stacks / f"rank-{ranks.rank}.txt",
            on_hang=lambda reason: record_end(run, "failed", exit_code=1, message=reason),
        )
        with _reporting(prepared, ranks, start) as reports, watchdog.watching():
            context = loop.RunContext(
                prepared=prepared,
                ranks=ranks,
                training=_training(prepared, ranks, engine, cost),
                reports=reports,
                pusher=pusher,
                stop_request=stop_request,
                watchdog=watchdog,
            )
            loop.train(context, start)

        # Finish. The run is complete once all that was asked for is on the disk and on the hub.
        _export(prepared, engine, ranks)
        push_the_rest(pusher, ranks, stop_request)
        if ranks.is_main:
            # The pusher may have kept a checkpoint that is old by now.
            remove_older(run, keep_last=recipe.checkpoint.keep_last)
            steps = prepared.order.total_steps
            message = f"trained {steps} steps, model in {run.model}"
            write_status(run, "complete", exit_code=0, message=message)
            logger.info("done: %d steps, model in %s, loss in %s", steps, run.model, run.plot)


def _open_run(prepared: Prepared, world_size: int) -> None:
    """Remove what killed starts left behind, and write what the run is."""
    run, request = prepared.run, prepared.request
    for repo in {request.push_checkpoints, request.push_to_hub}:
        if repo is not None:
            # Or days of training would end with the name of a repository that does not exist.
            check_access(repo)
    # Temporary files of these names belong to starts that were killed: this one holds the lock.
    atomic.remove_leftovers(run.path, r"model|\w+\.(?:json|jsonl|png)")
    atomic.remove_leftovers(run.checkpoints, r"(?:universal-)?step|step-\d+")
    old = read_description(run)
    description = describe(
        prepared.recipe, prepared.shard_set, prepared.order, world_size=world_size
    )
    if old is not None:
        # A resumed run continues its curve in Weights & Biases.
        description["wandb_id"] = old["wandb_id"]
    atomic.write_json(run.config, description)


def _training(prepared: Prepared, ranks: Ranks, engine: Any, cost: ModelCost) -> loop.Training:
    """Return what computes the steps: the engine, and the loaders of this rank."""
    recipe, eval_loader = prepared.recipe, None
    if prepared.eval_set is not None:
        eval_loader = EvalLoader(
            shard_set=prepared.eval_set,
            max_packs=recipe.eval.max_packs,
            rank=ranks.rank,
            world_size=ranks.world_size,
            packs_per_micro_batch=recipe.batch.packs_per_micro_batch,
            sequence_parallel=recipe.engine.sequence_parallel,
        )
        num_packs = len(eval_loader.pack_ids())
        logger.info("evaluating on %s: %d packs", prepared.eval_set.path, num_packs)
    loader = StepLoader(
        shard_set=prepared.shard_set,
        order=prepared.order,
        loss=recipe.loss,
        rank=ranks.rank,
        world_size=ranks.world_size,
        packs_per_micro_batch=recipe.batch.packs_per_micro_batch,
        sequence_parallel=recipe.engine.sequence_parallel,
    )
    return loop.Training(engine=engine, cost=cost, loader=loader, eval_loader=eval_loader)


@contextlib.contextmanager
def _reporting(
    prepared: Prepared, ranks: Ranks, start: TrainState
) -> Iterator[loop.Reports | None]:
    """Open what rank 0 reports to; close it when the block ends."""
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


def _export(prepared: Prepared, engine: Any, ranks: Ranks) -> None:
    """Draw the loss and export the model; the tokenizer is read for the first time here."""
    # All ranks take part in gathering the weights, which ZeRO-3 has spread over them.
    weights = consolidated_weights(engine)
    if ranks.is_main:
        from train.publish.export import export_model
        from train.publish.model_card import card_facts
        from train.results.plot import plot_runs

        run = prepared.run
        description = read_description(run)
        assert description is not None
        plot_runs([run.path], run.plot)
        export_model(
            state_dict=weights,
            model_config=engine.module.model.config,
            shard_set=prepared.shard_set,
            card=card_facts(description, prepared.shard_set.manifest, read_records(run.metrics)),
            out_dir=run.model,
            adapted=adapted_by(prepared.recipe),
            plot=run.plot,
            replace=True,
        )
    barrier(ranks)
