"""`sft-train plan`: what a run will take and whether it fits, before any GPU is requested."""

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
    """Of one GPU for an hour."""

    def __post_init__(self) -> None:
        if not 0.0 < self.mfu <= 1.0:
            raise ConfigError(f"--mfu {self.mfu}; expected a fraction from above 0 to 1")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ConfigError(
                f"--gpus {self.num_gpus} do not fill whole nodes of --gpus-per-node"
                f" {self.gpus_per_node}; give a multiple of {self.gpus_per_node}"
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
    """Why the ranks cannot run the steps at all."""
    division: Division | None
    """None if there are problems."""
    forecast: Forecast
    """Without any waiting if there are problems."""
    memory: Memory
    fits: bool
    changes: tuple[Change, ...]
    """What would make it fit, or save time."""
    command: str

    @property
    def gpu_hours(self) -> float:
        return self.forecast.seconds / 3600 * self.request.num_gpus

    @property
    def cost(self) -> float | None:
        """None without a price."""
        return None if self.request.price is None else self.gpu_hours * self.request.price

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.forecast.tokens / self.forecast.seconds / self.request.num_gpus


def make_plan(request: EstimateRequest) -> RunEstimate:
    """Return the plan.

    Raises ConfigError, DataError or ArtifactError for what no number of GPUs can run.
    """
    recipe, data, shard_set = _open_inputs(request)
    if shard_set is not None:
        order = make_run_order(recipe, shard_set.manifest)
        config = model_config(recipe.model, shard_set.manifest)
    else:
        longest = data.max_seq_len
        order = order_by_size(recipe, fingerprint="", max_seq_len=longest, totals=data.totals)
        config = network_config(recipe.model, max_seq_len=longest, from_shards={})
    gpu, ranks = gpu_named(request.gpu), request.num_gpus
    dtype = torch.float32 if recipe.engine.dtype == "fp32" else torch.bfloat16
    size = model_size(config, lora=recipe.lora, dtype=dtype)

    # Ranks that cannot run the steps are no error here: the plan says what would work instead.
    problem, split = "", None
    try:
        check_division(recipe, order, ranks)
    except ConfigError as exc:
        problem = str(exc)
        if order.unit == "pack":
            totals = data.totals
            per_step = round(order.units_per_step * totals.sequences / totals.packs)
            problem += (
                f". Steps of conversations divide over any ranks: about {per_step} of them are as"
                f" many tokens, --set 'batch={{conversations_per_step={per_step}}}'"
            )
    else:
        groups = ranks // recipe.engine.sequence_parallel
        split = division(recipe, order, data, shard_set, world_size=groups)

    # Memory is that of the step as the ranks would share it.
    micro_batches = split.micro_batches if split else 1
    setup = setup_of(recipe, data.max_seq_len, ranks, dtype=dtype, micro_batches=micro_batches)
    memory = memory_of(size, setup)
    per_node = min(ranks, request.gpus_per_node)
    return RunEstimate(
        request=request,
        recipe=recipe,
        data=data,
        order=order,
        size=size,
        gpu=gpu,
        zero_stage=setup.zero_stage,
        problems=(problem,) if problem else (),
        division=split,
        forecast=forecast(
            recipe,
            order,
            data,
            size.cost,
            flops_per_second=ranks * gpu.peak_flops * request.mfu,
            waiting=split.waiting if split else 1.0,
        ),
        memory=memory,
        fits=fits(memory, gpu),
        changes=tuple(changes(size, setup, gpu, recipe, gpus_per_node=request.gpus_per_node)),
        command=suggested_command(
            replace(request.train, verbosity=0),
            num_nodes=ranks // per_node,
            gpus_per_node=per_node,
        ),
    )


def _open_inputs(request: EstimateRequest) -> tuple[TrainConfig, DataSize, ShardSet | None]:
    """Return the recipe, the size of the data, and the shard set if there is one already."""
    train = request.train
    if request.sizes is None:
        recipe, shard_set = open_inputs(train)
        return recipe, size_of_shard_set(shard_set), shard_set
    if train.recipe is None:
        raise ConfigError(
            "no recipe: without a shard set that names one, give --recipe NAME|FILE.toml"
        )
    recipe = load_recipe(train.recipe, train.settings, model=train.model, max_steps=train.max_steps)
    if recipe.model.config is not None and "vocab_size" not in recipe.model.config:
        raise ConfigError(
            "model.config has no vocab_size, and there is no shard set to take it from; set it"
        )
    return recipe, size_from_flags(request.sizes), None
