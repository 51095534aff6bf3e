"""DeepSpeed behind few functions: its config, generated from ours; start; gradients; update; the
weights at the end.

Several ranks share out weights, gradients and optimizer state (ZeRO); one rank has whole weights
and `OneRankAdamW`. Nothing here waits for the device, but ZeRO does: in each step it reads the
gradient norm, which must be finite before an update begins, and offers no way around it.
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
WEIGHTS_PREFIX = "model."  # of the network inside LossModel, in DeepSpeed's names


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype for engine.dtype. Raises PrerequisiteError for bf16 on a GPU without it."""
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" else "fp32"
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise PrerequisiteError(
            "engine.dtype = 'bf16': this GPU has no bf16; set engine.dtype = 'fp32'"
        )
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def check_zero(engine: EngineConfig, ranks: Ranks) -> None:
    """Raise ConfigError or PrerequisiteError for what these ranks and devices cannot do."""
    if ranks.world_size % engine.hpz_partition_size:
        raise ConfigError(
            f"engine.hpz_partition_size = {engine.hpz_partition_size} does not divide"
            f" {ranks.world_size} ranks; use the ranks of a node"
        )
    for name in ("quantized_weights", "quantized_gradients"):
        if getattr(engine, name) and ranks.device.type != "cuda":
            raise PrerequisiteError(
                f"engine.{name} needs GPUs; here is {ranks.device.type}. Set it to false"
            )
    if engine.nvme_path and not Path(engine.nvme_path).is_dir():
        raise ConfigError(
            f"engine.nvme_path = {engine.nvme_path!r} is not a directory; make it, or name another"
        )


def deepspeed_config(
    stage: ZeroStage,
    optim: OptimConfig,
    *,
    dtype: torch.dtype,
    load_universal: bool = False,
    engine: EngineConfig = WITHOUT_OFFLOAD,
) -> dict[str, Any]:
    """Return DeepSpeed's config: every value stated, none "auto".

    Batch sizes are 1 because the normalisation is ours: losses come with their final weight, and
    `managed_gradient_accumulation` false makes each `step` the end of however many backward passes
    came before. Gradients are summed and sent in fp32 also where weights are bf16. In stage 0
    DeepSpeed is told nothing of bf16 and clipping: both are the optimizer's. `load_universal`: a
    checkpoint of another layout will be loaded.
    """
    zero: dict[str, Any] = {"stage": stage}
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
        "zero_force_ds_cpu_optimizer": (
            False
        ),  # torch's fused AdamW, offloaded or not: theirs would be compiled first
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.max_grad_norm if stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16 and stage > 0, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "timers": {
            "throughput": {"enabled": False, "synchronized": False}
        },  # or it waits for the device twice a step
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "checkpoint": {
            "load_universal": load_universal and stage > 0,
            "tag_validation": (
                "Ignore"
            ),  # of names that all ranks derive from the step; it waits for the device
        },
    }


def _offload(engine: EngineConfig) -> dict[str, Any]:
    """Return the keys of zero_optimization for offload and ZeRO++; none where nothing of it is
    asked for."""
    found: dict[str, Any] = {}
    for name, device in (
        ("offload_optimizer", engine.offload_optimizer),
        ("offload_param", engine.offload_params),
    ):
        if device != "none":
            place = {"nvme_path": engine.nvme_path} if device == "nvme" else {}
            found[name] = {"device": device, "pin_memory": torch.cuda.is_available(), **place}
    if engine.hpz_partition_size > 1:
        found["zero_hpz_partition_size"] = engine.hpz_partition_size
    if engine.quantized_weights:
        found["zero_quantized_weights"] = True
    if engine.quantized_gradients:
        found["zero_quantized_gradients"] = True
    return found


def shard_while_building(config: dict[str, Any]) -> HfDeepSpeedConfig | None:
    """Make transformers shard weights as it creates them (ZeRO-3), for as long as the returned
    object lives."""
    return HfDeepSpeedConfig(config) if config["zero_optimization"]["stage"] == 3 else None


def start_engine(
    model: LossModel, optim: OptimConfig, config: dict[str, Any], *, stop_after_skip: bool = False
) -> Any:
    """Return the engine around `model` with AdamW; for `stop_after_skip` see `OneRankAdamW`."""
    import deepspeed

    stage = config["zero_optimization"]["stage"]
    if stage == 0:
        model.to(
            deepspeed.get_accelerator().current_device_name()
        )  # before masters are made of the weights
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
        # torch's own optimizer: DeepSpeed's default compiles a kernel first, 53 s against 4
        optimizer = torch.optim.AdamW(
            groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, fused=True
        )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if stage == 0:
        engine.enable_backward_allreduce = False  # with itself: it would copy all gradients twice
    return engine


def accumulate(
    engine: Any,
    micro_batches: Sequence[MicroBatch],
    ranks: Ranks,
    source_totals: torch.Tensor | None = None,
    balancing: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run every micro-batch forward and backward; return their parts of the step's loss, fp32
    [num_micro_batches].

    A load balancing loss is not part of what is returned. `source_totals`, `balancing`: see
    `LossModel.forward`. Losses already carry their weight in the step's loss. DeepSpeed averages
    gradients over ranks, so each loss is multiplied by their number.
    """
    losses = torch.zeros(len(micro_batches), dtype=torch.float32, device=ranks.device)
    for number, batch in enumerate(micro_batches):
        before = None if balancing is None else balancing.clone()
        loss = engine(batch.to(ranks.device), source_totals, balancing)
        engine.backward(loss * ranks.world_size, scale_wrt_gas=False)
        losses[number] = loss.detach()
        if balancing is not None and before is not None:
            losses[number] -= engine.module.balancing_weight * (balancing - before)[0]
    return losses


def update(engine: Any, *, learning_rate: float) -> torch.Tensor:
    """Apply the accumulated gradients. Return whether that was refused, as one was not finite: bool
    [].

    Weights and optimizer are unchanged then. All ranks get the same answer. It lies on the device;
    `is_refused` says whether the host knows.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    engine.step()
    if isinstance(engine.optimizer, OneRankAdamW):
        assert engine.optimizer.refused is not None
        return engine.optimizer.refused
    return torch.full((), engine.optimizer.overflow, device=engine.device)


def is_refused(engine: Any) -> bool:
    """Return whether the last update is known to be refused: under ZeRO, which waits for the device
    to find out."""
    return bool(engine.optimizer.overflow)


def consolidated_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Return the full weights by their transformers names on rank 0 (all ranks must call), in the
    training dtype.

    Weights that are frozen beside adapters are left out: they are those of the base model.
    """
    frozen_out = has_frozen_weights(engine)
    if engine.zero_optimization_stage() == 3:
        state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=frozen_out)
    else:
        state = engine.module_state_dict(exclude_frozen_parameters=frozen_out)
    return {
        name.removeprefix(WEIGHTS_PREFIX): tensor.cpu() for name, tensor in (state or {}).items()
    }


def has_frozen_weights(engine: Any) -> bool:
    """Return whether some weights are not trained."""
    return not all(parameter.requires_grad for parameter in engine.module.parameters())


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that train, by name, in the order of the optimizer: matrices, then
    norms and biases."""
    named = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
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
