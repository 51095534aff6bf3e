"""One rank of a run, from an empty process to an exported model: puts the parts together around the
loop."""

import contextlib
import faulthandler
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from shared import atomic, config
from shared.disk import unwritable
from shared.errors import SftError
from shared.hashing import seed_from
from train.checkpoint.checkpoint import load_checkpoint, remove_older, set_aside_newer
from train.config import TrainConfig
from train.data.loader import Feed
from train.data.step_order import StepOrder
from train.engine.engine import (
    check_zero,
    choose_dtype,
    consolidated_weights,
    deepspeed_config,
    shard_while_building,
    start_engine,
)
from train.engine.process_group import Ranks, barrier, broadcast_from_main, process_group
from train.engine.sequence_parallel import register_ulysses, sequence_group
from train.loop import loop
from train.loop.evaluate import EvalFeed
from train.loop.loss_spikes import SpikeLog
from train.loop.metrics import MetricsLog
from train.loop.watchdog import Watchdog
from train.model.attention import choose_attention
from train.model.lora import adapted_by
from train.model.model import build_model, model_config
from train.publish.background_push import push_the_rest, pushing
from train.publish.hub import check_access
from train.run.directory import describe, read_description, write_status
from train.run.prepare import Prepared, check_ranks, decide_again, moves
from train.run.read_status import error_of
from train.run.record_status import record_end, recorded_end
from train.run.records import read_records
from train.run.stop_request import StopWish, watching_signals
from train.run.train_state import Counters, TrainState
from train.selftest.startup_check import check_isolation
from train.sizing.flops import ModelCost, model_cost
from train.sizing.zero_stage import ZeroStage, resolve_zero_stage

logger = logging.getLogger(__name__)


def run_rank(prepared: Prepared) -> bool:
    """Train, or go on training, and export; return False where another start has completed the run
    meanwhile.

    Raises SftError, StoppedOnRequest among them, as status.json then says; but for one that tells
    that the run can't be had, which leaves everything in its directory alone.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable(
            sys.__stderr__ or 2
        )  # a SIGBUS from a truncated shard file then says where
    run = prepared.run
    patience = _patience(prepared)
    with (
        watching_signals(run.stop) as wish,
        process_group(
            2 * patience + timedelta(minutes=1)
        ) as ranks,  # longer than the watchdog, which says more
        _held(prepared, ranks) as decided,
    ):
        if decided is None:
            return False
        _train(decided, ranks, wish)
        return True


def _train(prepared: Prepared, ranks: Ranks, wish: StopWish) -> None:
    """Do what `run_rank` does, with the run's lock held and `prepared` decided under it."""
    run = prepared.run
    patience = _patience(prepared)
    with (
        recorded_end(run),
        pushing(prepared.request, run, ranks) as pusher,
    ):
        check_ranks(prepared, ranks.world_size)
        if ranks.is_main:
            _open_run(prepared, ranks.world_size)
        barrier(ranks)
        engine, cost = _start(prepared, ranks)
        start = _starting_state(prepared, engine, ranks)
        log = _open_log(prepared, start) if ranks.is_main else None
        feed = Feed(
            shard_set=prepared.shard_set,
            order=prepared.order,
            loss=prepared.recipe.loss,
            rank=ranks.rank,
            world_size=ranks.world_size,
            packs_per_micro_batch=prepared.recipe.batch.packs_per_micro_batch,
            sequence_parallel=prepared.recipe.engine.sequence_parallel,
        )
        watchdog = Watchdog(
            limit_seconds=patience.total_seconds(),
            stacks=run.stacks / f"rank-{ranks.rank}.txt",
            on_hang=lambda reason: record_end(run, "failed", exit_code=1, message=reason),
        )
        parts = loop.Parts(
            prepared=prepared,
            ranks=ranks,
            engine=engine,
            feed=feed,
            eval_feed=_eval_feed(prepared, ranks),
            cost=cost,
            log=log,
            spikes=(
                SpikeLog(run.spikes, sigma=prepared.recipe.log.spike_sigma, after_step=start.step)
                if ranks.is_main
                else None
            ),
            pusher=pusher,
            wish=wish,
            watchdog=watchdog,
        )
        try:
            with watchdog.watching():
                loop.train(parts, start)
        finally:
            if log is not None:
                log.close()
        _finish(prepared, engine, ranks)
        push_the_rest(pusher, ranks, wish)
        _complete(prepared, ranks)


def _patience(prepared: Prepared) -> timedelta:
    return timedelta(minutes=prepared.recipe.run.hang_timeout_minutes)


def _start(prepared: Prepared, ranks: Ranks) -> tuple[Any, ModelCost]:
    """Return the engine and what a step costs."""
    recipe = prepared.recipe
    dtype = choose_dtype(recipe.engine.dtype, ranks.device)
    attention = choose_attention(recipe.model.attention, device=ranks.device, dtype=dtype)
    stage = resolve_zero_stage(recipe.engine, world_size=ranks.world_size)
    check_zero(recipe.engine, ranks)
    settings = deepspeed_config(
        stage,
        recipe.optim,
        dtype=dtype,
        load_universal=moves(prepared, ranks.world_size),
        engine=recipe.engine,
    )
    _quiet_libraries()
    network_config = model_config(recipe.model, prepared.shard_set.manifest)
    longest = prepared.shard_set.manifest.max_seq_len
    check_isolation(network_config, attention, device=ranks.device, dtype=dtype, longest=longest)
    group = sequence_group(ranks, recipe.engine.sequence_parallel)
    if group is not None:
        attention = register_ulysses(attention.removeprefix("sft_"), network_config, group)
    # random weights are drawn whole: drawn in shards they would be other numbers, which then hung
    # on the ZeRO stage
    sharding = shard_while_building(settings) if recipe.model.config is None else None
    model = build_model(
        recipe.model,
        prepared.shard_set.manifest,
        attention=attention,
        dtype=dtype,
        seed=seed_from("weights", recipe.run.seed),
        lora=recipe.lora,
        balancing_weight=recipe.loss.load_balancing_weight,
    )
    cost = model_cost(model.model)
    engine = start_engine(model, recipe.optim, settings, halts=recipe.run.on_non_finite == "stop")
    del sharding
    torch.manual_seed(seed_from("dropout", recipe.run.seed, ranks.rank))
    _announce(prepared, ranks, attention=attention, dtype=dtype, stage=stage)
    return engine, cost


def _quiet_libraries() -> None:
    """DeepSpeed tells every save at INFO; transformers draws progress bars, also into files."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


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


def _eval_feed(prepared: Prepared, ranks: Ranks) -> EvalFeed | None:
    if prepared.eval_set is None:
        return None
    recipe = prepared.recipe
    feed = EvalFeed(
        shard_set=prepared.eval_set,
        max_packs=recipe.eval.max_packs,
        rank=ranks.rank,
        world_size=ranks.world_size,
        packs_per_micro_batch=recipe.batch.packs_per_micro_batch,
        sequence_parallel=recipe.engine.sequence_parallel,
    )
    logger.info("evaluating on %s: %d packs", prepared.eval_set.path, len(feed.pack_ids()))
    return feed


def _open_log(prepared: Prepared, start: TrainState) -> MetricsLog:
    description = read_description(prepared.run)
    assert description is not None
    return MetricsLog(
        prepared.run.metrics,
        config=prepared.recipe.log,
        run_name=prepared.run.path.name,
        wandb_id=description["wandb_id"],
        recipe=config.to_plain(prepared.recipe),
        after_step=start.step,
        is_evaluated=start.eval_loss is not None,
    )


def _finish(prepared: Prepared, engine: Any, ranks: Ranks) -> None:
    """Export the model and draw the loss; the tokenizer comes into play here and no earlier."""
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


@contextlib.contextmanager
def _held(prepared: Prepared, ranks: Ranks) -> Iterator[Prepared | None]:
    """Rank 0 keeps other starts out of the directory, and decides there what this one does; None
    for nothing.

    What `prepare` saw may be of an hour ago, before another start trained on. A refusal reaches
    every rank, so that all end with its exit code.
    """
    decided: Prepared | None = None
    said: tuple[str, object] = ("", None)
    with contextlib.ExitStack() as lock:
        refusal: SftError | OSError | None = None
        if ranks.is_main:
            try:
                lock.enter_context(
                    atomic.exclusive_lock(prepared.run.lock, f"training in {prepared.run.path}")
                )
                decided = decide_again(prepared)
                if not decided.is_complete:
                    write_status(prepared.run, "running", exit_code=None, message="")
                said = ("complete" if decided.is_complete else "go on", decided.resume_from)
            except (SftError, OSError) as exc:
                refusal = exc
                known = exc if isinstance(exc, SftError) else unwritable(exc)
                said = (" ".join(str(exc).split()), known.exit_code if known is not None else 1)
        word, detail = cast(tuple[str, object], broadcast_from_main(said, ranks))
        if refusal is not None:
            raise refusal
        if word not in ("complete", "go on"):
            raise error_of(detail)(word)
        yield (
            None if word == "complete" else replace(prepared, resume_from=cast(Path | None, detail))
        )


def _announce(
    prepared: Prepared, ranks: Ranks, *, attention: str, dtype: torch.dtype, stage: ZeroStage
) -> None:
    order, recipe, totals = prepared.order, prepared.recipe, prepared.shard_set.manifest.totals
    logger.info(
        "%s: %d packs, %d conversations, %s tokens (%s loss tokens); %d steps of %s",
        prepared.shard_set.manifest.name,
        totals.packs,
        totals.sequences,
        f"{totals.tokens:,}",
        f"{totals.loss_tokens:,}",
        order.total_steps,
        _step_in_words(order, recipe, prepared.shard_set.manifest.max_seq_len, ranks.world_size),
    )
    logger.info(
        "%s, %s, attention %s, ZeRO stage %d",
        ranks.device,
        dtype,
        attention.removeprefix("sft_"),
        stage,
    )


def _step_in_words(order: StepOrder, recipe: TrainConfig, max_seq_len: int, world_size: int) -> str:
    per_micro_batch, shared_by = recipe.batch.packs_per_micro_batch, recipe.engine.sequence_parallel
    num_shares = world_size // shared_by
    shares = f"{num_shares} groups of {shared_by} ranks" if shared_by > 1 else f"{num_shares} ranks"
    if order.unit == "conversation":
        most = per_micro_batch * max_seq_len
        return (
            f"{order.units_per_step} conversations over {shares}, in micro-batches of up to {most}"
            " tokens"
        )
    micro_batches = order.units_per_step // num_shares // per_micro_batch
    return (
        f"{order.units_per_step} packs = {shares} x {micro_batches} micro-batches x"
        f" {per_micro_batch} packs"
    )
