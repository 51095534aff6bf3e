"""`sft-train plan`: what a run will take and whether it will fit, before any GPU is asked for."""

from dataclasses import dataclass, replace

import torch

from shared.errors import ConfigError
from shared.shard_reader import ShardSet
from train.config import TrainConfig
from train.data.step_order import StepOrder
from train.estimate.data_size import DataSize, StatedSizes, size_from_flags, size_of_shard_set
from train.estimate.memory_advice import Change, changes, fits, setup_of
from train.estimate.run_length import Division, Forecast, division, forecast
from train.launch.multi_node import suggested_command
from train.model.model import model_config, network_config
from train.recipe_file import load_recipe
from train.run.prepare import (
    TrainRequest,
    check_division,
    make_run_order,
    open_inputs,
    order_by_size,
)
from train.sizing.gpu_specs import Gpu, gpu_named
from train.sizing.memory import Memory, memory_of
from train.sizing.model_size import ModelSize, model_size


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateRequest:
    """The command line of `sft-train plan`."""

    train: TrainRequest
    sizes: StatedSizes | None
    """Instead of the shard set of `train`."""
    num_gpus: int
    gpus_per_node: int
    gpu: str
    mfu: float
    price: float | None
    """Of a GPU for an hour."""

    def __post_init__(self) -> None:
        if not 0.0 < self.mfu <= 1.0:
            raise ConfigError(f"--mfu {self.mfu}; expected a fraction from above 0 to 1")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ConfigError(
                f"--gpus {self.num_gpus} are no whole nodes of --gpus-per-node {self.gpus_per_node}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEstimate:
    request: EstimateRequest
    recipe: TrainConfig
    data: DataSize
    order: StepOrder
    size: ModelSize
    gpu: Gpu
    zero_stage: int
    problems: tuple[str, ...]
    """Why the ranks can't run the steps at all."""
    division: Division | None
    """None where there are problems."""
    forecast: Forecast
    """Without waiting where there are problems."""
    memory: Memory
    fits: bool
    changes: tuple[Change, ...]
    """What would make it fit, or spare time."""
    command: str


def make_plan(request: EstimateRequest) -> RunEstimate:
    """Return the plan. Raises ConfigError, DataError or ArtifactError for what no number of GPUs
    can run."""
    recipe, data, shard_set = _inputs(request)
    gpu = gpu_named(request.gpu)
    dtype = torch.float32 if recipe.engine.dtype == "fp32" else torch.bfloat16
    if shard_set is not None:
        order = make_run_order(recipe, shard_set.manifest)
        config = model_config(recipe.model, shard_set.manifest)
    elif recipe.model.config is not None and "vocab_size" not in recipe.model.config:
        raise ConfigError(
            "model.config has no vocab_size, and without a shard set nothing else says it; set it"
        )
    else:
        order = order_by_size(
            recipe, fingerprint="", max_seq_len=data.max_seq_len, totals=data.totals
        )
        config = network_config(recipe.model, max_seq_len=data.max_seq_len, from_shards={})
    size = model_size(config, lora=recipe.lora, dtype=dtype)
    ranks = request.num_gpus
    problem = _problem(recipe, order, data, ranks)
    shared = (
        None
        if problem
        else division(
            recipe, order, data, shard_set, world_size=ranks // recipe.engine.sequence_parallel
        )
    )
    max_seq_len = data.max_seq_len
    setup = setup_of(
        recipe, max_seq_len, ranks, dtype=dtype, micro_batches=shared.micro_batches if shared else 1
    )
    memory = memory_of(size, setup)
    return RunEstimate(
        request=request,
        recipe=recipe,
        data=data,
        order=order,
        size=size,
        gpu=gpu,
        zero_stage=setup.zero_stage,
        problems=(problem,) if problem else (),
        division=shared,
        forecast=forecast(
            recipe,
            order,
            data,
            size.cost,
            flops_per_second=ranks * gpu.peak_flops * request.mfu,
            waiting=shared.waiting if shared else 1.0,
        ),
        memory=memory,
        fits=fits(memory, gpu),
        changes=tuple(changes(size, setup, gpu, recipe, gpus_per_node=request.gpus_per_node)),
        command=_command(request),
    )


def _inputs(request: EstimateRequest) -> tuple[TrainConfig, DataSize, ShardSet | None]:
    if request.sizes is None:
        recipe, shard_set = open_inputs(request.train)
        return recipe, size_of_shard_set(shard_set), shard_set
    train = request.train
    if train.recipe is None:
        raise ConfigError(
            "no recipe: without a shard set that names one, give --recipe NAME|FILE.toml"
        )
    recipe = load_recipe(train.recipe, train.settings, model=train.model, max_steps=train.max_steps)
    return recipe, size_from_flags(request.sizes), None


def _problem(recipe: TrainConfig, order: StepOrder, data: DataSize, ranks: int) -> str:
    """Return why `ranks` can't run the steps, with what can be done; empty where they can."""
    try:
        check_division(recipe, order, ranks)
    except ConfigError as exc:
        totals = data.totals
        alike = round(order.units_per_step * totals.sequences / totals.packs)
        if order.unit == "conversation":
            return str(exc)
        return (
            f"{exc}. Steps of conversations divide over any ranks: about {alike} are as many"
            f" tokens, --set 'batch={{conversations_per_step={alike}}}'"
        )
    return ""


def _command(request: EstimateRequest) -> str:
    per_node = min(request.num_gpus, request.gpus_per_node)
    train = replace(request.train, verbosity=0)
    return suggested_command(train, num_nodes=request.num_gpus // per_node, gpus_per_node=per_node)
