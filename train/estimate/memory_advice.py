"""Whether a run fits on its GPUs, and which changes to the recipe or the GPUs make it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from shared.errors import ConfigError
from train.config import TrainConfig
from train.sizing.gpu_specs import Gpu
from train.sizing.memory import GIB, Memory, Setup, memory_of
from train.sizing.model_size import ModelSize
from train.sizing.zero_stage import resolve_zero_stage

_TIMES_MORE_GPUS = (2, 4, 8, 16, 32, 64)
_MLP_TILES = 8
_SHARES = (2, 4, 8)
# What saves less than a hundredth is no advice.
_WORTH_IT = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    what: str
    gib: float
    """Of the fullest GPU after the change."""
    fits: bool
    host_gib: float = 0.0
    """Of the host's memory for each GPU, where states are offloaded there."""


def fits(memory: Memory, gpu: Gpu) -> bool:
    return memory.total <= gpu.memory_gib * GIB


def setup_of(
    recipe: TrainConfig,
    max_seq_len: int,
    world_size: int,
    *,
    dtype: torch.dtype,
    micro_batches: int,
    on_gpu: bool = True,
) -> Setup:
    """Return the settings of `recipe` that decide about memory on `world_size` ranks."""
    try:
        zero_stage = resolve_zero_stage(recipe.engine, world_size=world_size)
    except ConfigError:
        # check_division reports a stage that these ranks cannot have. Memory is that of stage 3.
        zero_stage = 3
    micro_batch_tokens = recipe.batch.packs_per_micro_batch * max_seq_len
    return Setup(
        world_size=world_size,
        zero_stage=zero_stage,
        weight_bytes=dtype.itemsize,
        tokens=-(-micro_batch_tokens // recipe.engine.sequence_parallel),
        micro_batches=micro_batches,
        gradient_checkpointing=recipe.model.gradient_checkpointing,
        mlp_tiles=recipe.model.mlp_tiles,
        quantized=recipe.lora.quantize != "none",
        optimizer_offloaded=recipe.engine.offload_optimizer != "none",
        params_offloaded=recipe.engine.offload_params != "none",
        second_copy=recipe.engine.hpz_partition_size,
        on_gpu=on_gpu,
    )


def changes(
    size: ModelSize, setup: Setup, gpu: Gpu, recipe: TrainConfig, *, gpus_per_node: int
) -> list[Change]:
    """Return what would make the run fit; if it fits, what would make it faster and still fit."""
    memory = memory_of(size, setup)
    if not fits(memory, gpu):
        savings = _savings(size, setup, gpu, recipe, gpus_per_node=gpus_per_node)
        return [change for change in savings if change.gib <= _WORTH_IT * memory.total / GIB]
    faster = memory_of(size, replace(setup, gradient_checkpointing=False))
    if not setup.gradient_checkpointing or not fits(faster, gpu):
        return []
    return [Change(what="model.gradient_checkpointing=false", gib=faster.total / GIB, fits=True)]


def _savings(
    size: ModelSize, setup: Setup, gpu: Gpu, recipe: TrainConfig, *, gpus_per_node: int
) -> Iterator[Change]:
    """Yield changes that need less memory, the cheap ones first.

    The first two, smaller micro-batches and gradient checkpointing, are part of all later ones.
    """

    def change(what: str, changed: Setup, *, host_gib: float = 0.0) -> Change:
        memory = memory_of(size, changed)
        return Change(what=what, gib=memory.total / GIB, fits=fits(memory, gpu), host_gib=host_gib)

    # `saving` collects what every run can do for less memory; `words` are its --set arguments.
    packs, shared_by = recipe.batch.packs_per_micro_batch, recipe.engine.sequence_parallel
    saving, words = setup, ""
    if packs > 1:
        saving = replace(saving, tokens=setup.tokens // packs)
        words = "batch.packs_per_micro_batch=1"
        yield change(words, saving)
    if not setup.gradient_checkpointing:
        saving = replace(saving, gradient_checkpointing=True)
        words = f"{words} model.gradient_checkpointing=true".strip()
        yield change(words, saving)
    if setup.mlp_tiles == 1 and size.mlp_bytes:
        yield change(
            f"{words} model.mlp_tiles={_MLP_TILES}".strip(), replace(saving, mlp_tiles=_MLP_TILES)
        )
    for share in _SHARES if shared_by == 1 else ():
        # Ulysses gives each rank whole heads; key heads may also be repeated.
        key_heads = size.num_key_heads
        heads_divide = size.num_heads % share == 0 and (
            key_heads % share == 0 or share % key_heads == 0
        )
        if heads_divide and setup.world_size % share == 0:
            changed = replace(saving, tokens=-(-saving.tokens // share))
            yield change(f"{words} engine.sequence_parallel={share}".strip(), changed)
    if setup.zero_stage > 0 and not setup.optimizer_offloaded:
        offloaded = replace(saving, optimizer_offloaded=True)
        before, after = memory_of(size, saving), memory_of(size, offloaded)
        # The host takes the optimizer states, and the gradients that the GPU no longer keeps.
        host_gib = (before.optimizer + before.gradients - after.gradients) / GIB
        yield change(f"{words} engine.offload_optimizer=cpu".strip(), offloaded, host_gib=host_gib)
    yield from _more_gpus(size, setup, saving, gpu, gpus_per_node=gpus_per_node)


def _more_gpus(
    size: ModelSize, setup: Setup, saving: Setup, gpu: Gpu, *, gpus_per_node: int
) -> Iterator[Change]:
    """Yield the smallest number of GPUs on which the run fits unchanged, and the smallest on which
    it fits with the changes that save memory, where that is another one."""
    # Stage 0 is for one rank alone: more GPUs would shard everything.
    stage = 3 if setup.zero_stage == 0 else setup.zero_stage
    seen: set[int] = set()
    for form, words in (
        (setup, ""),
        (saving, ", with the changes above that come before mlp_tiles"),
    ):
        for ranks in (times * setup.world_size for times in _TIMES_MORE_GPUS):
            memory = memory_of(size, replace(form, world_size=ranks, zero_stage=stage))
            if not fits(memory, gpu):
                continue
            if ranks not in seen:
                nodes = f" ({ranks // gpus_per_node} nodes)" if ranks > gpus_per_node else ""
                what = f"--gpus {ranks}{nodes}{words}"
                yield Change(what=what, gib=memory.total / GIB, fits=True)
            seen.add(ranks)
            break
