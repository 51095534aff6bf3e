"""Tiny models whose rotary angles depend on the length of a sequence, and some whose do not."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from train.model.attention import register_attention

VOCAB = 61
ORIGINAL = 16
HEAD = 16
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
BASE = {"rope_theta": 1e4}
LONGROPE = {
    **BASE,
    "rope_type": "longrope",
    "original_max_position_embeddings": ORIGINAL,
    "factor": 4.0,
    "short_factor": [1.0 + index / 8 for index in range(HEAD // 2)],
    "long_factor": [2.0 + 2 * index for index in range(HEAD // 2)],
}
DYNAMIC = {**BASE, "rope_type": "dynamic", "factor": 4.0}
YARN = {**BASE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LINEAR = {**YARN, "rope_type": "linear"}
LLAMA3 = {
    **BASE,
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "phi3-longrope": {
        "model_type": "phi3",
        "max_position_embeddings": 64,
        "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": LONGROPE,
    },
    "llama-longrope": {
        "model_type": "llama",
        "max_position_embeddings": 64,
        "rope_parameters": LONGROPE,
    },
    "llama-dynamic": {
        "model_type": "llama",
        "max_position_embeddings": ORIGINAL,
        "rope_parameters": DYNAMIC,
    },
    "llama-yarn": {"model_type": "llama", "max_position_embeddings": 64, "rope_parameters": YARN},
    "llama-llama3": {
        "model_type": "llama",
        "max_position_embeddings": 64,
        "rope_parameters": LLAMA3,
    },
    "phimoe": {
        "model_type": "phimoe",
        "max_position_embeddings": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4},
    },
    "phimoe-linear": {
        "model_type": "phimoe",
        "max_position_embeddings": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "rope_parameters": {**LINEAR, "short_mscale": 1.1, "long_mscale": 1.4},
    },
    "olmo3-mixed": {
        "model_type": "olmo3",
        "max_position_embeddings": 64,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {**BASE, "rope_type": "default"},
            "full_attention": LONGROPE,
        },
    },
}


def make(name: str) -> PreTrainedModel:
    values = {**COMMON, **MODELS[name]}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(2)
    network = AutoModelForCausalLM.from_config(
        config, attn_implementation=register_attention("per_sequence")
    )
    assert isinstance(network, PreTrainedModel)
    return network
