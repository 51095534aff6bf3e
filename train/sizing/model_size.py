"""Counts of a model, taken on torch's meta device: its weights are never allocated, so any size
takes a second.

What a layer keeps for its backward pass does not come from a table of model types but is counted:
the forward pass runs on tensors without data, and each tensor that autograd saves counts once. For
Llama in bf16 the count is, per token and layer,

    16 D      two norms: input in fp32 (4 D); normalised input and output in bf16 (2 D each)
    4 (H + K) h + 4 H   queries, keys, values, output of attention in bf16, log-sums in fp32
    8 I       gate, silu(gate), up and their product in bf16

with hidden size D, intermediate size I, H query and K key heads of size h: the sum of Korthikanti
et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", section 4.1) for
SwiGLU, grouped queries and RMSNorm in fp32, without dropout, and without score matrices, which
kernels for packed rows do not keep (their section 4.2.2).
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from shared.errors import ConfigError
from train.config import LoraConfig
from train.model.lora import add_adapters
from train.model.model import CANNOT_BUILD, check_head, check_supported
from train.sizing.flops import ModelCost, model_cost

_ATTENTION = "sft_counted"
_TOKENS = 256  # all counts are linear in the number of tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    parameters: int
    trained: int
    """The trained ones among the parameters; with adapters, only theirs."""
    largest: int
    """Elements of the largest matrix of a layer."""
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_key_heads: int
    layer_bytes: float
    """Bytes that a layer keeps for its backward pass, per token: the mean of the layers."""
    mlp_bytes: float
    """The part of these that its `mlp` keeps; 0 for a model whose layers have no `mlp`."""
    other_bytes: float
    """Bytes kept outside of layers, per token."""
    cost: ModelCost


def model_size(config: PretrainedConfig, *, lora: LoraConfig, dtype: torch.dtype) -> ModelSize:
    """Return the counts of a model with weights and activations of `dtype`. Raises ConfigError if
    it cannot be built."""
    check_supported(config)
    AttentionInterface.register(_ATTENTION, _counted_attention)
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(
                config, attn_implementation=_ATTENTION, dtype=dtype
            )
        check_head(network)
        if lora.is_on:
            with torch.device("meta"):
                add_adapters(network, lora, seed=0)
        cost = model_cost(network)
        sizes = _kept_bytes(network)
    except CANNOT_BUILD as exc:
        raise ConfigError(
            f"model type {config.model_type!r} cannot be counted without its weights: {exc}; use"
            " another model"
        ) from exc
    layers = [part for part in network.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"model type {config.model_type!r} has no layers of the class that transformers"
            " checkpoints; use another model"
        )
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        trained=sum(
            parameter.numel() for parameter in network.parameters() if parameter.requires_grad
        ),
        largest=max(parameter.numel() for layer in layers for parameter in layer.parameters()),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=len(layers),
        num_heads=config.num_attention_heads,
        num_key_heads=config.num_key_value_heads,
        layer_bytes=sizes["layer"] / len(layers) / _TOKENS,
        mlp_bytes=sizes["mlp"] / len(layers) / _TOKENS,
        other_bytes=sizes["other"] / _TOKENS,
        cost=cost,
    )


def _kept_bytes(network: PreTrainedModel) -> dict[str, int]:
    """Run the layers forward and return the bytes saved in all layers, in their mlps, and
    elsewhere."""
    network.train()
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    # A tensor of each storage, kept alive so that no other storage can get its address.
    tensors: dict[int, torch.Tensor] = {}
    bytes_in = {"layer": 0, "mlp": 0, "other": 0}
    depth = {"layer": 0, "mlp": 0}  # how many modules of the kind are running

    def weigh(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in tensors:
            tensors[storage._cdata] = tensor
            bytes_in["layer" if depth["layer"] else "other"] += storage.nbytes()
            bytes_in["mlp"] += storage.nbytes() if depth["mlp"] else 0
        return tensor

    for part in network.base_model.modules():
        if isinstance(part, GradientCheckpointingLayer):
            _count_depth(part, depth, "layer")
        if "mlp" in dict(part.named_children()):
            _count_depth(part.mlp, depth, "mlp")
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    bounds = torch.zeros(2, dtype=torch.int32, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
        network.base_model(
            input_ids=ids,
            position_ids=ids,
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=_TOKENS,
            max_length_k=_TOKENS,
        )
    return bytes_in


def _count_depth(part: torch.nn.Module, depth: dict[str, int], name: str) -> None:
    def enter(*_arguments: Any) -> None:
        depth[name] += 1

    def leave(*_arguments: Any) -> None:
        depth[name] -= 1

    part.register_forward_pre_hook(enter)
    part.register_forward_hook(leave)


class _CountedAttention(torch.autograd.Function):
    """Saves what kernels for packed rows save: queries, keys, values, output, and one log-sum per
    query and head."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        _, heads, tokens, _ = query.shape
        output = query.new_empty(1, tokens, heads, value.shape[-1])
        log_sums = query.new_empty(heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> Any:
        raise NotImplementedError("counted, never trained")


def _counted_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, N, D]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    output = _CountedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    assert isinstance(output, torch.Tensor)
    return output, None
