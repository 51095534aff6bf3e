"""Counts on the meta device against a real model: parameters, and bytes that autograd keeps."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shared.errors import ConfigError
from train.config import LoraConfig
from train.model.lora import add_adapters
from train.sizing.model_size import model_size

BASE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "vocab_size": 100,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "qwen3"])
@pytest.mark.parametrize("rank", [0, 4])
def test_parameters_are_those_of_the_model_that_trains(model_type: str, rank: int) -> None:
    config, lora = AutoConfig.for_model(model_type, **BASE), LoraConfig(rank=rank)
    size = model_size(config, lora=lora, dtype=torch.float32)
    network = AutoModelForCausalLM.from_config(config)
    if rank:
        add_adapters(network, lora, seed=0)
    parameters = list(network.parameters())
    assert size.parameters == sum(p.numel() for p in parameters)
    assert size.trained == sum(p.numel() for p in parameters if p.requires_grad)
    assert (size.num_layers, size.num_heads, size.num_key_heads) == (3, 6, 2)
    assert (size.hidden_size, size.vocab_size) == (48, 100)
    assert size.largest == 48 * 80


@pytest.mark.parametrize("seed", range(5))
def test_a_llama_layer_keeps_the_sum_of_the_docstring(seed: int) -> None:
    draw = random.Random(seed)
    key_heads, head_size = draw.choice([1, 2, 4]), draw.choice([8, 16])
    heads = key_heads * draw.choice([1, 2, 3])
    hidden, inner = 8 * draw.randint(4, 20), 8 * draw.randint(4, 40)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=(num_layers := draw.randint(1, 3)),
        vocab_size=50,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_size,
    )
    size = model_size(config, lora=LoraConfig(), dtype=torch.bfloat16)
    attention = 4 * (heads + key_heads) * head_size + 4 * heads
    # The sum leaves out the inverse roots of the two norms in fp32, and the sines and cosines that
    # all layers share.
    small = 8 + 4 * head_size / num_layers
    assert size.layer_bytes == pytest.approx(16 * hidden + attention + 8 * inner + small)
    assert size.mlp_bytes == 8 * inner + 2 * hidden


def test_a_model_that_cannot_be_built_is_refused() -> None:
    config = AutoConfig.for_model("llama", **{**BASE, "hidden_act": "nonsense"})
    with pytest.raises(ConfigError, match="'llama' cannot be counted without its weights"):
        model_size(config, lora=LoraConfig(), dtype=torch.float32)
