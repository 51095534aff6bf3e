"""Memory by formula: DeepSpeed's own estimators for the states, a published sum for activations."""

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from estimates import LLAMA
from transformers import AutoConfig

from train.config import LoraConfig
from train.sizing.memory import GIB, Setup, memory_of
from train.sizing.model_size import ModelSize, model_size


@pytest.fixture(scope="module")
def llama() -> ModelSize:
    return size_of(LLAMA)


def size_of(
    values: dict[str, Any], lora: LoraConfig | None = None, dtype: torch.dtype = torch.bfloat16
) -> ModelSize:
    return model_size(AutoConfig.for_model(**values), lora=lora or LoraConfig(), dtype=dtype)


def setup(**changes: Any) -> Setup:
    settings: dict[str, Any] = {
        "world_size": 8, "zero_stage": 3, "weight_bytes": 2, "tokens": 4096, "micro_batches": 2,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return Setup(**(settings | changes))


def test_a_llama_layer_keeps_what_the_published_sum_says(llama: ModelSize) -> None:
    """Korthikanti et al. 2022 for SwiGLU, grouped queries, norms in fp32: see
    train/sizing/model_size.py."""
    hidden, wide, heads, key_heads, head = 4096, 14336, 32, 8, 128
    formula = 16 * hidden + 4 * (heads + key_heads) * head + 4 * heads + 8 * wide
    assert llama.layer_bytes == pytest.approx(formula, rel=1e-3)
    assert llama.mlp_bytes == pytest.approx(8 * wide, rel=0.1)


@pytest.mark.parametrize("model_type", ["olmo2", "qwen3", "mistral", "mixtral"])
def test_other_architectures_are_counted_too(model_type: str) -> None:
    size = size_of({**LLAMA, "model_type": model_type, "num_hidden_layers": 2})
    assert size.num_layers == 2
    assert size.layer_bytes > 100_000


def test_adapters_train_alone() -> None:
    size = size_of({**LLAMA, "num_hidden_layers": 2}, LoraConfig(rank=8))
    assert 0 < size.trained < 0.01 * size.parameters


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_zero3_states_are_those_of_deepspeeds_estimator(llama: ModelSize, gpus: int) -> None:
    memory = memory_of(llama, setup(world_size=gpus))
    _, theirs, layer = estimate_zero3_model_states_mem_needs(
        llama.parameters, 0, gpus, 1, False, False
    )
    assert layer == 0
    assert memory.state == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_zero2_states_are_those_of_deepspeeds_estimator_without_gradients_in_16_bits(
    llama: ModelSize, gpus: int
) -> None:
    """It counts gradients in bf16 and in fp32; ours are summed in fp32 and the others freed at
    once."""
    memory = memory_of(llama, setup(world_size=gpus, zero_stage=2))
    _, theirs = estimate_zero2_model_states_mem_needs(llama.parameters, gpus, 1, False)
    assert memory.state == pytest.approx(theirs - 2 * llama.parameters / gpus, rel=1e-6)


@pytest.mark.parametrize(
    "less",
    [
        {"gradient_checkpointing": True},
        {"tokens": 2048},
        {"world_size": 16},
        {"mlp_tiles": 4},
        {"optimizer_offloaded": True},
        {"params_offloaded": True},
    ],
)
def test_what_saves_memory_does(llama: ModelSize, less: dict[str, Any]) -> None:
    assert memory_of(llama, setup(**less)).total < memory_of(llama, setup()).total


def test_one_rank_has_everything(llama: ModelSize) -> None:
    memory = memory_of(llama, setup(world_size=1, zero_stage=0))
    assert memory.state == 18 * llama.parameters
    assert memory.communication == 0
    assert memory.total > memory.state > 130 * GIB
