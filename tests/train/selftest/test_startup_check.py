"""Each type of model passes the check of isolation or is refused with a reason; a leaking kernel is
refused."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from train_runs import train_here, write_inputs
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
)

from shared.errors import ConfigError
from train.model import attention as attention_module
from train.model.attention import register_attention
from train.selftest.startup_check import check_isolation, small_config

CPU = torch.device("cpu")
GOOD = [
    "llama",
    "olmo",
    "olmo2",
    "olmo3",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "gemma",
    "gemma3_text",
    "granite",
    "cohere",
    "smollm3",
    "olmoe",
    "mixtral",
    "qwen3_moe",
    "granitemoe",
    "deepseek_v3",
    "gpt_neox",
]
REFUSED = {
    "gemma2": "changes its logits",
    "gpt_oss": "attention sinks",
    "stablelm": "does not let its attention be replaced",
    "phi": "no plain LM head",
    "mamba": "does not let its attention be replaced",
    "qwen3_next": "layers of type linear_attention",
    "jamba": "does not let its attention be replaced",
    "falcon_h1": "does not let its attention be replaced",
    "llama4_text": "layers of type chunked_attention",
}


def check(model_type: str, **changes: Any) -> None:
    config = AutoConfig.for_model(model_type, **changes)
    check_isolation(config, register_attention("per_sequence"), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("model_type", GOOD)
def test_types_that_attend_within_bounds_pass(model_type: str) -> None:
    check(model_type)


@pytest.mark.parametrize("model_type", REFUSED)
def test_types_that_would_not_train_exactly_are_refused_with_a_reason(model_type: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[model_type]):
        check(model_type)


def whole_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention that ignores where sequences end."""
    output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def both_ways(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention that keeps sequences apart, but lets a token see later ones."""
    bounds = options["cu_seq_lens_q"].tolist()
    parts = [
        scaled_dot_product_attention(*(t[:, :, a:b] for t in (query, key, value)), enable_gqa=True)
        for a, b in pairwise(bounds)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def no_window(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    return attention_module.per_sequence(
        module, query, key, value, mask, **{**options, "sliding_window": None}
    )


@pytest.fixture(params=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[request.param]


@pytest.mark.parametrize(
    ("function", "model_type", "failed"),
    [
        (whole_row, "llama", "neighbours"),
        (both_ways, "llama", "later tokens"),
        (no_window, "mistral", "packed = alone"),
    ],
)
def test_a_wrong_kernel_is_refused(
    function: Any, model_type: str, failed: str, dtype: torch.dtype
) -> None:
    AttentionInterface.register("sft_wrong", function)
    AttentionMaskInterface.register("sft_wrong", lambda *_args, **_options: None)
    with pytest.raises(
        ConfigError, match=f"'{model_type}' with attention 'wrong' fails the check '{failed}'"
    ):
        check_isolation(AutoConfig.for_model(model_type), "sft_wrong", device=CPU, dtype=dtype)


def test_a_correct_kernel_passes_in_either_dtype(dtype: torch.dtype) -> None:
    check_isolation(
        AutoConfig.for_model("llama"), register_attention("per_sequence"), device=CPU, dtype=dtype
    )


def test_a_run_with_a_leaking_kernel_ends_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention_module.FUNCTIONS, "per_sequence", whole_row)
    shards, recipe = write_inputs(tmp_path)
    done = train_here("--shards", shards, "--recipe", recipe, "--output", tmp_path / "run")
    assert done.exit_code == 3
    assert "fails the check 'neighbours'" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_check_leaves_random_numbers_as_they_were() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check("llama")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_small_model_keeps_what_isolation_depends_on() -> None:
    config = AutoConfig.for_model("gemma3_text", sliding_window=512)
    small = small_config(config)
    assert set(small.layer_types) == set(config.layer_types)
    assert small.head_dim == config.head_dim
    assert small.sliding_window < 31  # shorter than each sequence of the check
