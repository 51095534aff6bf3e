"""FLOPs by formula against the products that torch counts while a model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from train.sizing.flops import model_cost, peak_flops

LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "vocab_size": 100,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
}


def network_of(**changes: object) -> PreTrainedModel:
    config = AutoConfig.for_model("llama", **{**LLAMA, **changes})
    network: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    return network


def counted(network: PreTrainedModel, length: int) -> int:
    """The FLOPs of all matrix products of a forward and backward pass over one sequence."""
    counter = FlopCounterMode(display=False)
    with counter:
        network(input_ids=torch.zeros(1, length, dtype=torch.int64)).logits.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_formula_is_what_a_forward_and_backward_pass_multiplies(
    tied: bool, frozen: bool
) -> None:
    """Eager attention computes all pairs, twice as many as causal ones. Norms, 6 per weight, are no
    products. The weights of frozen layers take no gradient, which saves a third."""
    network = network_of(tie_word_embeddings=tied)
    if frozen:
        network.requires_grad_(False)
        network.get_input_embeddings().weight.requires_grad_(True)
        network.get_output_embeddings().weight.requires_grad_(True)
    cost = model_cost(network)
    norms = sum(p.numel() for p in network.parameters() if p.ndim == 1)
    for length in (5, 12):
        products = cost.flops(
            tokens=length, loss_tokens=length, squared_lengths=2 * length * length
        )
        assert counted(network, length) == products - (4 if frozen else 6) * norms * length


def test_cost_is_the_same_when_weights_are_sharded() -> None:
    """Under ZeRO-3 a parameter is empty and keeps its size in `ds_numel`."""
    network = network_of(tie_word_embeddings=True)
    whole = model_cost(network)
    for parameter in network.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert model_cost(network) == whole


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
