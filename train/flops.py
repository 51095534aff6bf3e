"""How much arithmetic a step needs, and what the device could do: the two sides of MFU."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from train.gpus import find_gpu


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """FLOPs of forward and backward, as FLOPs = tokens x body + loss_tokens x head + squared_lengths x attention.

    A parameter of the body costs 6 per token (2 forward, 4 backward), one that is frozen 4; embeddings cost nothing;
    the head is run for loss tokens only, 6 x hidden x vocabulary each. Causal attention over a sequence of length L
    multiplies queries with keys and scores with values, 2 x 2 x (L^2 / 2) x heads x head_size forward and twice that
    backward: 6 x L^2 x heads x head_size per layer, summed over sequences, not over packs. Recomputation is not
    counted.
    """

    body: float
    head: float
    attention: float

    def flops(self, *, tokens: int, loss_tokens: int, squared_lengths: int) -> float:
        return tokens * self.body + loss_tokens * self.head + squared_lengths * self.attention


def model_cost(network: PreTrainedModel) -> ModelCost:
    """Return the cost of `network`; call it before its weights are sharded, or with their full counts known."""
    embeddings = {id(network.get_input_embeddings().weight), id(network.get_output_embeddings().weight)}
    body = sum(
        (6.0 if p.requires_grad else 4.0) * _num_elements(p) for p in network.parameters() if id(p) not in embeddings
    )
    config = network.config
    head_size = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return ModelCost(
        body=body,
        head=6.0 * config.hidden_size * config.vocab_size,
        attention=6.0 * config.num_hidden_layers * config.num_attention_heads * head_size,
    )


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of `device` in FLOP/s, or None where it is not known: then there is no MFU."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak_flops


def _num_elements(parameter: torch.nn.Parameter) -> int:
    """Under ZeRO-3 a parameter is empty outside the forward pass and keeps its size in `ds_numel`."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
