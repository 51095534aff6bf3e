"""The FLOPs that a step needs and those that the device could do: the two sides of MFU."""

import logging
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from train.sizing.gpu_specs import find_gpu

logger = logging.getLogger(__name__)

# Keys that configs use for the number of routed experts, and for how many of them a token visits.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """FLOPs of forward and backward: tokens x body + loss_tokens x head + squared_lengths x
    attention.

    A parameter of the body costs 6 per token (2 forward, 4 backward), or 4 if it is frozen; one of
    routed experts costs k / E of that, since a token visits k of E. Embeddings cost nothing. The
    head runs for loss tokens only, at 6 x hidden x vocabulary each. Causal attention over a
    sequence of length L multiplies queries with keys and scores with values, 2 x 2 x (L^2 / 2) x
    heads x head_size forward and twice that backward: 6 x L^2 x heads x head_size per layer, summed
    over sequences, not packs. Recomputation is not counted.
    """

    body: float
    head: float
    attention: float

    def flops(self, *, tokens: int, loss_tokens: int, squared_lengths: int) -> float:
        return tokens * self.body + loss_tokens * self.head + squared_lengths * self.attention


def model_cost(network: PreTrainedModel) -> ModelCost:
    """Return the cost of `network`, whose weights may be sharded by ZeRO-3."""
    # The head counts by loss tokens below; the embedding only looks up rows.
    embeddings = {
        id(network.get_input_embeddings().weight),
        id(network.get_output_embeddings().weight),
    }
    config = network.config
    # The share of the routed experts that a token visits; 1 for a model without any.
    share = 1.0
    if any(_is_routed(name) for name, _ in network.named_parameters()):
        values = config.to_dict()
        total = next((values[key] for key in _EXPERTS if values.get(key)), None)
        active = next((values[key] for key in _ACTIVE_EXPERTS if values.get(key)), None)
        if total is not None and active is not None:
            share = active / total
        else:
            logger.warning(
                "%s has experts, but its config does not have the number of them that a token"
                " visits; mfu counts all",
                type(network).__name__,
            )
    # Under ZeRO-3 a parameter is empty outside the forward pass and keeps its size in `ds_numel`.
    body = sum(
        (6.0 if parameter.requires_grad else 4.0)
        * int(getattr(parameter, "ds_numel", parameter.numel()))
        * (share if _is_routed(name) else 1.0)
        for name, parameter in network.named_parameters()
        if id(parameter) not in embeddings
    )
    head_size = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return ModelCost(
        body=body,
        head=6.0 * config.hidden_size * config.vocab_size,
        attention=6.0 * config.num_hidden_layers * config.num_attention_heads * head_size,
    )


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of `device` in FLOP/s, or None if it is unknown and there is no
    MFU."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak_flops


def _is_routed(name: str) -> bool:
    """Return whether a parameter belongs to routed experts, which share a module called `experts`.

    Experts that every token visits are in `shared_expert(s)`; the router is no expert.
    """
    return "experts" in name.split(".")
