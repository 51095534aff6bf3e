"""The DeepSpeed config is golden, and weight decay leaves norms and biases alone."""

import json
from pathlib import Path

import pytest
import torch

from train.config import OptimConfig
from train.engine.engine import choose_dtype, deepspeed_config
from train.sizing.zero_stage import ZeroStage

OPTIM = OptimConfig(learning_rate=1e-4, max_grad_norm=0.5)
GOLDEN = {
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "managed_gradient_accumulation": False,
    "gradient_clipping": 0.5,
    "zero_optimization": {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True, "check_grad_overflow": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
    "timers": {"throughput": {"enabled": False, "synchronized": False}},
    "steps_per_print": None,
    "wall_clock_breakdown": False,
    "checkpoint": {"load_universal": False, "tag_validation": "Ignore"},
}


def test_the_deepspeed_config_is_golden() -> None:
    assert deepspeed_config(3, OPTIM, dtype=torch.bfloat16) == GOLDEN


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_is_left_to_auto(stage: ZeroStage, dtype: torch.dtype) -> None:
    config = deepspeed_config(stage, OPTIM, dtype=dtype)
    assert "auto" not in json.dumps(config)
    assert config["bf16"]["enabled"] == (dtype == torch.bfloat16 and stage > 0)


def test_the_dtype_follows_the_device() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bf16", cpu) == torch.bfloat16


def test_weight_decay_acts_on_matrices_only() -> None:
    from train.engine.engine import _parameter_groups

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    decayed, free = _parameter_groups(model, 0.1)  # type: ignore[arg-type]
    assert [p.ndim for p in decayed["params"]] == [2]
    assert [p.ndim for p in free["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


@pytest.mark.slow
def test_the_engine_runs_in_bf16_with_fp32_sums(tmp_path: Path) -> None:
    """On a CPU, where only tests use bf16: losses are near those of fp32."""
    from train_runs import losses, train_here, weights, write_inputs

    shards, recipe = write_inputs(tmp_path)
    call = (
        "--shards",
        shards,
        "--recipe",
        recipe,
        "--set",
        "model.config.attention_dropout=0.0",
        "--max-steps",
        3,
    )
    for dtype in ("bf16", "fp32"):
        assert (
            train_here(
                *call, "--output", tmp_path / dtype, "--set", f"engine.dtype={dtype}"
            ).exit_code
            == 0
        )
    for (_, half), (_, full) in zip(
        losses(tmp_path / "bf16"), losses(tmp_path / "fp32"), strict=True
    ):
        assert half == pytest.approx(full, rel=2e-2)
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.bfloat16}
