"""FLOPs count the experts that a token goes through; peaks are those of the data sheets."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from train.sizing.flops import model_cost
from train.sizing.gpu_specs import find_gpu


def test_flops_of_a_step_follow_the_formula() -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    cost = model_cost(AutoModelForCausalLM.from_config(config))
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert cost.body == 6 * (2 * layer + 32)
    assert cost.head == 6 * 32 * 100
    # one sequence of 10 tokens: 2 layers x 4 heads x 8 x (10 x 10 / 2) pairs x 2 products x 2 x 3
    # passes
    assert cost.flops(tokens=0, loss_tokens=0, squared_lengths=100) == 2 * 32 * 50 * 2 * 2 * 3
    assert cost.flops(tokens=2, loss_tokens=3, squared_lengths=0) == 2 * cost.body + 3 * cost.head


# The weights of a layer: q, k, v and o of 4 heads of 8; the norms before attention and experts.
ATTENTION, NORMS = 4 * 32 * 32, 2 * 32
EXPERT = 3 * 32 * 16


def mixture_of_experts(kind: str, **options: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=100,
        num_experts_per_tok=2,
        **options,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize(
    ("kind", "options", "further"),
    [
        # Norms of queries and keys over all heads, or over one head.
        ("olmoe", {"num_experts": 8}, 2 * 32),
        ("qwen3_moe", {"num_experts": 8}, 2 * 8),
        ("mixtral", {"num_local_experts": 8}, 0),
        # Biases of q, k and v; an expert that all tokens go through, and its gate.
        (
            "qwen2_moe",
            {"num_experts": 8, "shared_expert_intermediate_size": 24},
            3 * 32 + 3 * 32 * 24 + 32,
        ),
    ],
)
def test_only_the_experts_that_a_token_goes_through_count(
    kind: str, options: dict[str, int], further: int
) -> None:
    cost = model_cost(mixture_of_experts(kind, **options))
    router = 8 * 32
    assert cost.body == 6 * (2 * (ATTENTION + NORMS + further + router + 2 * EXPERT) + 32)
    assert cost.attention == 6 * 2 * 32


def test_experts_are_known_by_name_if_zero3_holds_the_weights() -> None:
    model = mixture_of_experts("olmoe", num_experts=8)
    whole = model_cost(model).body
    # As ZeRO-3 leaves them:
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert model_cost(model).body == whole


def test_an_unknown_number_of_active_experts_counts_all_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = mixture_of_experts("olmoe", num_experts=8)
    active = model_cost(model).body
    model.config.num_experts_per_tok = 0
    assert model_cost(model).body == active + 6 * 2 * 6 * EXPERT
    assert "mfu counts all" in caplog.text


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H20", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_the_data_sheet_numbers_without_sparsity(name: str, peak: float | None) -> None:
    gpu = find_gpu(name)
    assert (gpu.peak_flops if gpu else None) == peak
