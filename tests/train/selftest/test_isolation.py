"""The measurement of isolation sees every leak between sequences and reports no other."""

import contextlib
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from train.model.attention import register_attention
from train.selftest.isolation import (
    Finding,
    eager_attention,
    evaluating,
    isolation_of,
    relative_size,
)
from train.selftest.startup_check import small_config

BOUNDS = [0, 9, 20, 26, 40, 47, 60]


def network_of(model_type: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(1)
    network: PreTrainedModel = AutoModelForCausalLM.from_config(
        small_config(AutoConfig.for_model(model_type)), attn_implementation=attention
    )
    return network


def findings_of(network: PreTrainedModel, bounds: list[int] = BOUNDS) -> dict[str, Finding]:
    ids = torch.randint(0, 256, (bounds[-1],), generator=torch.Generator().manual_seed(2))
    return {finding.check: finding for finding in isolation_of(network, ids, bounds)}


@pytest.mark.parametrize("bounds", [[0, 60], [0, 1, 2, 60], BOUNDS])
def test_any_number_of_sequences_passes_with_attention_within_each(bounds: list[int]) -> None:
    network = network_of("llama", register_attention("per_sequence"))
    findings = findings_of(network, bounds)
    assert list(findings) == ["neighbours", "later tokens", "packed = alone"]
    assert all(finding.is_ok for finding in findings.values())


@pytest.mark.parametrize("leaking", range(1, len(BOUNDS) - 1))
def test_a_leak_into_any_one_sequence_is_seen(leaking: int) -> None:
    """Neighbours are changed for four of the six sequences only; the comparison with each sequence
    alone sees all."""

    def leak(
        _module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: Any,
        **_options: Any,
    ) -> tuple[torch.Tensor, None]:
        outputs = []
        for number, (start, end) in enumerate(pairwise(BOUNDS)):
            first = BOUNDS[leaking - 1] if number == leaking else start
            mask = torch.ones(end - start, end - first, dtype=torch.bool).tril(start - first)
            outputs.append(
                scaled_dot_product_attention(
                    query[:, :, start:end],
                    key[:, :, first:end],
                    value[:, :, first:end],
                    attn_mask=mask,
                    enable_gqa=True,
                )
            )
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("sft_leak", leak)
    AttentionMaskInterface.register("sft_leak", lambda *_args, **_options: None)
    findings = findings_of(network_of("llama", "sft_leak"))
    assert not findings["packed = alone"].is_ok
    assert findings["neighbours"].is_ok == (leaking not in (0, 2, 3, 5))


@pytest.mark.parametrize("model_type", ["minimax", "jamba"])
def test_state_between_sequences_shows_in_the_outputs(model_type: str) -> None:
    """No list of types or layers is needed for it: the lists only name the cause sooner."""
    network = network_of(model_type, register_attention("per_sequence"))
    assert not findings_of(network, [0, 20, 35, 60])["neighbours"].is_ok


def test_a_network_of_nan_fails_every_check() -> None:
    network = network_of("llama", register_attention("per_sequence"))
    torch.nn.init.constant_(network.get_input_embeddings().weight, math.nan)
    assert not any(finding.is_ok for finding in findings_of(network).values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_infinitely_large(bad: float) -> None:
    """Python's max() and comparisons lose a NaN, so it must not get out as one."""
    good, spoilt = torch.tensor([3.0, -4.0]), torch.tensor([1.0, bad])
    assert relative_size(good, torch.tensor([2.0, -2.0])) == 2.0
    for difference, reference in ((spoilt, good), (good, spoilt), (spoilt, spoilt)):
        assert relative_size(difference, reference) == math.inf


def test_mode_and_attention_are_restored_even_after_an_error() -> None:
    network = network_of("llama", register_attention("per_sequence")).train()
    modes = []
    with contextlib.suppress(RuntimeError), evaluating(network), eager_attention(network):
        modes.append((network.training, network.config._attn_implementation))
        raise RuntimeError
    assert modes == [(False, "eager")]
    assert network.training
    assert network.config._attn_implementation == "sft_per_sequence"
