"""DeepSpeed behind a few functions: its config, start, gradients, update, and the final weights.

Several ranks share weights, gradients and optimizer state (ZeRO); a single rank has whole weights
and `OneRankAdamW`. Nothing in this file waits for the device, but ZeRO does: in each step it reads
the gradient norm before the update, and has no option to avoid that.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import HfDeepSpeedConfig

from shared.errors import ConfigError, PrerequisiteError
from train.config import EngineConfig, OptimConfig
from train.data.micro_batch import MicroBatch
from train.engine.process_group import Ranks
from train.engine.single_rank_adamw import OneRankAdamW
from train.model.model import LossModel
from train.sizing.zero_stage import ZeroStage

WITHOUT_OFFLOAD = EngineConfig()
WEIGHTS_PREFIX = "model."  # DeepSpeed's names of weights start with it: LossModel.model


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for engine.dtype. Raises PrerequisiteError for bf16 on a GPU without it."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise PrerequisiteError(
            "engine.dtype = 'bf16', but this GPU does not support it; set engine.dtype = 'fp32'"
        )
    return torch.bfloat16 if name == "bf16" else torch.float32


def check_zero(engine: EngineConfig, ranks: Ranks) -> None:
    """Raise ConfigError or PrerequisiteError for settings that these ranks or devices cannot
    have."""
    if ranks.world_size % engine.hpz_partition_size:
        raise ConfigError(
            f"engine.hpz_partition_size = {engine.hpz_partition_size} does not divide"
            f" {ranks.world_size} ranks; use the number of ranks of a node"
        )
    for name in ("quantized_weights", "quantized_gradients"):
        if getattr(engine, name) and ranks.device.type != "cuda":
            raise PrerequisiteError(
                f"engine.{name} needs GPUs, this run has {ranks.device.type}; set it to false"
            )
    if engine.nvme_path and not Path(engine.nvme_path).is_dir():
        raise ConfigError(
            f"engine.nvme_path = {engine.nvme_path!r} is not a directory; create it, or set another"
        )


def deepspeed_config(
    stage: ZeroStage,
    optim: OptimConfig,
    *,
    dtype: torch.dtype,
    load_universal: bool = False,
    engine: EngineConfig = WITHOUT_OFFLOAD,
) -> dict[str, Any]:
    """Return DeepSpeed's config, in which no value is "auto".

    Batch sizes are 1 because the normalisation is ours: losses come with their final weight, and
    with `managed_gradient_accumulation` false, each `step` ends any number of backward passes.
    Gradients are summed and sent in fp32 even for bf16 weights. In stage 0 bf16 and clipping are
    off, since the optimizer does both. `load_universal`: a checkpoint of another layout will be
    loaded.
    """
    zero: dict[str, Any] = {"stage": stage}
    # Buckets of 50 million elements: 200 MB of gradients in fp32 per message.
    if stage > 0:
        zero |= {
            "contiguous_gradients": True,
            "overlap_comm": stage > 1,
            "reduce_bucket_size": 50_000_000,
        }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    zero |= _offload(engine)
    return {
        # torch's fused AdamW, offloaded or not: DeepSpeed would compile its own first.
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.max_grad_norm if stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16 and stage > 0, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Its throughput timer waits for the device twice a step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "checkpoint": {
            "load_universal": load_universal and stage > 0,
            # All ranks derive the tag from the step; to compare them waits for the device.
            "tag_validation": "Ignore",
        },
    }


def _offload(engine: EngineConfig) -> dict[str, Any]:
    """Return the keys of zero_optimization for offloading and ZeRO++, if any is on."""
    keys: dict[str, Any] = {}
    for name, device in (
        ("offload_optimizer", engine.offload_optimizer),
        ("offload_param", engine.offload_params),
    ):
        if device != "none":
            path = {"nvme_path": engine.nvme_path} if device == "nvme" else {}
            keys[name] = {"device": device, "pin_memory": torch.cuda.is_available(), **path}
    if engine.hpz_partition_size > 1:
        keys["zero_hpz_partition_size"] = engine.hpz_partition_size
    if engine.quantized_weights:
        keys["zero_quantized_weights"] = True
    if engine.quantized_gradients:
        keys["zero_quantized_gradients"] = True
    return keys


def shard_while_building(config: dict[str, Any]) -> HfDeepSpeedConfig | None:
    """Make transformers shard weights as it creates them (ZeRO-3), while the returned object
    lives."""
    return HfDeepSpeedConfig(config) if config["zero_optimization"]["stage"] == 3 else None


def start_engine(
    model: LossModel, optim: OptimConfig, config: dict[str, Any], *, stop_after_skip: bool = False
) -> Any:
    """Return the engine around `model` with AdamW; for `stop_after_skip` see `OneRankAdamW`."""
    import deepspeed

    stage = config["zero_optimization"]["stage"]
    if stage == 0:
        # Before the optimizer makes masters of the weights.
        model.to(deepspeed.get_accelerator().current_device_name())
    groups = _parameter_groups(model, optim.weight_decay)
    optimizer: torch.optim.Optimizer
    if stage == 0:
        optimizer = OneRankAdamW(
            groups,
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            max_grad_norm=optim.max_grad_norm,
            stop_after_skip=stop_after_skip,
        )
    else:
        # torch's optimizer starts in 4 s; DeepSpeed's default first compiles a kernel, 53 s.
        optimizer = torch.optim.AdamW(
            groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, fused=True
        )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if stage == 0:
        # One rank would reduce with itself, and copy all gradients twice for it.
        engine.enable_backward_allreduce = False
    return engine


def accumulate(
    engine: Any,
    micro_batches: Sequence[MicroBatch],
    ranks: Ranks,
    source_totals: torch.Tensor | None = None,
    balancing: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run every micro-batch forward and backward; return their shares of the step's loss, fp32
    [num_micro_batches].

    The load balancing loss is left out of these. `source_totals`, `balancing`: see
    `LossModel.forward`.
    """
    losses = torch.zeros(len(micro_batches), dtype=torch.float32, device=ranks.device)
    for number, batch in enumerate(micro_batches):
        before = None if balancing is None else balancing.clone()
        loss = engine(batch.to(ranks.device), source_totals, balancing)
        # The loss has its weight in the step's loss already. DeepSpeed averages gradients over the
        # ranks, so their number restores the sum.
        engine.backward(loss * ranks.world_size, scale_wrt_gas=False)
        losses[number] = loss.detach()
        # `balancing` sums over micro-batches: the difference is the part of this one.
        if balancing is not None and before is not None:
            losses[number] -= engine.module.balancing_weight * (balancing - before)[0]
    return losses


def update(engine: Any, *, learning_rate: float) -> torch.Tensor:
    """Apply the accumulated gradients; return whether the update was skipped because one was not
    finite: bool [].

    A skipped update leaves weights and optimizer unchanged. All ranks get the same answer. It stays
    on the device; `is_skipped` tells what the host knows.
    """
    # The schedule is ours, not DeepSpeed's.
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    engine.step()
    if isinstance(engine.optimizer, OneRankAdamW):
        assert engine.optimizer.skipped is not None
        return engine.optimizer.skipped
    return torch.full((), engine.optimizer.overflow, device=engine.device)


def is_skipped(engine: Any) -> bool:
    """Return whether the host knows that the last update was skipped: only under ZeRO, which waits
    for the device to find out."""
    return bool(engine.optimizer.overflow)


def consolidated_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Return the full weights by their transformers names on rank 0, in the training dtype; every
    rank must call it.

    Frozen weights are left out: they are those of the base model.
    """
    without_frozen = has_frozen_weights(engine)
    if engine.zero_optimization_stage() == 3:
        state = engine._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=without_frozen
        )
    else:
        state = engine.module_state_dict(exclude_frozen_parameters=without_frozen)
    return {
        name.removeprefix(WEIGHTS_PREFIX): tensor.cpu() for name, tensor in (state or {}).items()
    }


def has_frozen_weights(engine: Any) -> bool:
    """Return whether some weights are not trained."""
    return not all(parameter.requires_grad for parameter in engine.module.parameters())


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by name in the order of the optimizer: matrices, then norms and
    biases."""
    named = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    # The sort is stable, so both kinds keep the order of the model.
    return dict(sorted(named, key=lambda item: _num_dimensions(item[1]) < 2))


def _parameter_groups(model: LossModel, weight_decay: float) -> list[dict[str, Any]]:
    trained = trained_parameters(model).values()
    matrices = [parameter for parameter in trained if _num_dimensions(parameter) >= 2]
    vectors = [parameter for parameter in trained if _num_dimensions(parameter) < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _num_dimensions(parameter: Any) -> int:
    """Under ZeRO-3 a parameter is empty outside the forward pass and keeps its shape in
    `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
