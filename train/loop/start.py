"""A recipe and a shard set -> the model in its engine, with the attention that this device runs."""

import logging
import sys
from typing import Any

import torch
import transformers

from shared.hashing import seed_from
from train.config import TrainConfig
from train.data.step_order import StepOrder
from train.engine.engine import (
    check_zero,
    choose_dtype,
    deepspeed_config,
    shard_while_building,
    start_engine,
)
from train.engine.process_group import Ranks
from train.engine.sequence_parallel import register_ulysses, sequence_group
from train.model.attention import choose_attention
from train.model.model import build_model, model_config
from train.run.prepare import Prepared, needs_resharding
from train.selftest.startup_check import check_isolation
from train.sizing.flops import ModelCost, model_cost
from train.sizing.zero_stage import ZeroStage, resolve_zero_stage

logger = logging.getLogger(__name__)


def start_model(prepared: Prepared, ranks: Ranks) -> tuple[Any, ModelCost]:
    """Return DeepSpeed's engine around the model of the run, checked for leaks, and what a step
    costs. Raises ConfigError for a model that cannot train exactly."""
    recipe = prepared.recipe
    dtype = choose_dtype(recipe.engine.dtype, ranks.device)
    attention = choose_attention(recipe.model.attention, device=ranks.device, dtype=dtype)
    stage = resolve_zero_stage(recipe.engine, world_size=ranks.world_size)
    check_zero(recipe.engine, ranks)
    settings = deepspeed_config(
        stage,
        recipe.optim,
        dtype=dtype,
        load_universal=needs_resharding(prepared, ranks.world_size),
        engine=recipe.engine,
    )
    _quiet_libraries()
    network_config = model_config(recipe.model, prepared.shard_set.manifest)
    longest = prepared.shard_set.manifest.max_seq_len
    check_isolation(network_config, attention, device=ranks.device, dtype=dtype, longest=longest)
    group = sequence_group(ranks, recipe.engine.sequence_parallel)
    if group is not None:
        attention = register_ulysses(attention.removeprefix("sft_"), network_config, group)
    # random weights are drawn whole: drawn in shards they would depend on the ZeRO stage
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
    engine = start_engine(
        model, recipe.optim, settings, stop_after_skip=recipe.run.on_non_finite == "stop"
    )
    del sharding
    torch.manual_seed(seed_from("dropout", recipe.run.seed, ranks.rank))
    _announce(prepared, ranks, attention=attention, dtype=dtype, stage=stage)
    return engine, cost


def _quiet_libraries() -> None:
    """DeepSpeed logs every save at INFO; transformers draws progress bars, into files too."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


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
