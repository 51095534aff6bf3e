"""How much arithmetic a step needs, and what the device could do: the two sides of MFU."""

import logging
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from train.sizing.gpu_specs import find_gpu

logger = logging.getLogger(__name__)

# what configurations call the number of routed experts, and how many of them a token goes through
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """FLOPs of forward and backward, as FLOPs = tokens x body + loss_tokens x head +
    squared_lengths x attention.

    A parameter of the body costs 6 per token (2 forward, 4 backward), one that is frozen 4;
    embeddings cost nothing; routed experts cost the share k/E of that, as a token goes through k of
    E; the head is run for loss tokens only, 6 x hidden x vocabulary each. Causal attention over a
    sequence of length L multiplies queries with keys and scores with values, 2 x 2 x (L^2 / 2) x
    heads x head_size forward and twice that backward: 6 x L^2 x heads x head_size per layer, summed
    over sequences, not over packs. Recomputation is not counted.
    """

    body: float
    head: float
    attention: float

    def flops(self, *, tokens: int, loss_tokens: int, squared_lengths: int) -> float:
        return tokens * self.body + loss_tokens * self.head + squared_lengths * self.attention


def model_cost(network: PreTrainedModel) -> ModelCost:
    """Return the cost of `network`; call it before its weights are sharded, or with their full
    counts known."""
    embeddings = {
        id(network.get_input_embeddings().weight),
        id(network.get_output_embeddings().weight),
    }
    share = _active_share(network)
    body = sum(
        (6.0 if parameter.requires_grad else 4.0)
        * _num_elements(parameter)
        * (share if _is_routed(name) else 1.0)
        for name, parameter in network.named_parameters()
        if id(parameter) not in embeddings
    )
    config = network.config
    head_size = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return ModelCost(
        body=body,
        head=6.0 * config.hidden_size * config.vocab_size,
        attention=6.0 * config.num_hidden_layers * config.num_attention_heads * head_size,
    )


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of `device` in FLOP/s, or None where it is not known: then there
    is no MFU."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak_flops


def _active_share(network: PreTrainedModel) -> float:
    """Return which share of the routed experts a token goes through: 1 for a model without any."""
    if not any(_is_routed(name) for name, _ in network.named_parameters()):
        return 1.0
    config = network.config.to_dict()
    total, active = (
        next((config[key] for key in keys if config.get(key)), None)
        for keys in (_EXPERTS, _ACTIVE_EXPERTS)
    )
    if total is None or active is None:
        logger.warning(
            "%s has experts, but its configuration does not say how many of them a token goes"
            " through; mfu counts all",
            type(network).__name__,
        )
        return 1.0
    return float(active / total)


def _is_routed(name: str) -> bool:
    """Say whether a parameter belongs to experts that tokens are routed to: they share a module
    called `experts`.

    Those that every token goes through are in `shared_expert(s)`; the router itself is no expert.
    """
    return "experts" in name.split(".")


def _num_elements(parameter: torch.nn.Parameter) -> int:
    """Under ZeRO-3 a parameter is empty outside the forward pass and keeps its size in
    `ds_numel`."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
