"""The start of a rank: from a recipe and a shard set to the model in DeepSpeed's engine.

Whatever can be wrong with the device, the ranks or the attention kernel is refused before any
weights are read.
"""

import logging
import sys
from typing import Any

import torch
import transformers

from shared.hashing import seed_from
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
    """Return DeepSpeed's engine around the model of the run, and what a step costs.

    Raises ConfigError for a model whose packed sequences would see each other.
    """
    recipe, manifest = prepared.recipe, prepared.shard_set.manifest
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
    # DeepSpeed logs every save at INFO; transformers draws progress bars, into files too.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()

    network_config, longest = model_config(recipe.model, manifest), manifest.max_seq_len
    check_isolation(network_config, attention, device=ranks.device, dtype=dtype, longest=longest)
    group = sequence_group(ranks, recipe.engine.sequence_parallel)
    if group is not None:
        attention = register_ulysses(attention.removeprefix("sft_"), network_config, group)
    # Random weights are drawn whole: drawn in shards they would depend on the ZeRO stage. For
    # weights from files, transformers shards while this object lives.
    sharding = shard_while_building(settings) if recipe.model.config is None else None
    model = build_model(
        recipe.model,
        manifest,
        attention=attention,
        dtype=dtype,
        seed=seed_from("weights", recipe.run.seed),
        lora=recipe.lora,
        balancing_weight=recipe.loss.load_balancing_weight,
    )
    # Counted before ZeRO takes the weights apart.
    cost = model_cost(model.model)
    engine = start_engine(
        model, recipe.optim, settings, stop_after_skip=recipe.run.on_non_finite == "stop"
    )
    del sharding
    # Each rank draws its own dropout.
    torch.manual_seed(seed_from("dropout", recipe.run.seed, ranks.rank))
    _announce(prepared, ranks, attention=attention, dtype=dtype, stage=stage)
    return engine, cost


def _announce(
    prepared: Prepared, ranks: Ranks, *, attention: str, dtype: torch.dtype, stage: ZeroStage
) -> None:
    """Log the data, how a step is shared out, and what it runs on."""
    order, recipe, manifest = prepared.order, prepared.recipe, prepared.shard_set.manifest
    per_micro_batch, shared_by = recipe.batch.packs_per_micro_batch, recipe.engine.sequence_parallel
    num_groups = ranks.world_size // shared_by
    groups = f"{num_groups} groups of {shared_by} ranks" if shared_by > 1 else f"{num_groups} ranks"
    if order.unit == "conversation":
        step = (
            f"{order.units_per_step} conversations over {groups}, in micro-batches of up to"
            f" {per_micro_batch * manifest.max_seq_len} tokens"
        )
    else:
        step = (
            f"{order.units_per_step} packs = {groups} x"
            f" {order.units_per_step // num_groups // per_micro_batch} micro-batches x"
            f" {per_micro_batch} packs"
        )
    logger.info(
        "%s: %d packs, %d conversations, %s tokens (%s loss tokens); %d steps of %s",
        manifest.name,
        manifest.totals.packs,
        manifest.totals.sequences,
        f"{manifest.totals.tokens:,}",
        f"{manifest.totals.loss_tokens:,}",
        order.total_steps,
        step,
    )
    kernel = attention.removeprefix("sft_")
    logger.info("%s, %s, attention %s, ZeRO stage %d", ranks.device, dtype, kernel, stage)
