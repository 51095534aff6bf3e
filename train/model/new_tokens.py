"""Embedding rows of tokens that the mixture added, trained where all other weights are frozen
(under LoRA).

    embedding and LM head   [ 0 1 2 ... first-1 | first ... first+n-1 | ... ]
                              frozen              new_rows [n, D]       frozen (padding)

The base model has learned nothing for these tokens, whether it has rows for their ids or not, so
their rows start random. They are parameters of their own beside the frozen matrix, which may be
shorter: nothing of it is copied. peft's layer for this (`trainable_token_indices`) does not work
under DeepSpeed; the exported adapter is in its format.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from shared.errors import ConfigError

ROWS = "new_rows"
_SUFFIX = f".{ROWS}"


def add_new_rows(network: PreTrainedModel, new_ids: Sequence[int], *, seed: int) -> None:
    """Give embedding and LM head trained rows for `new_ids`, which follow on one another; the same
    on every rank.

    Tied weights stay tied: the rows are then those of the embedding. Raises ConfigError for an
    embedding that does more than look rows up.
    """
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    scale = getattr(embedding, "embed_scale", None)  # of Gemma's
    if type(embedding).forward is not torch.nn.Embedding.forward and scale is None:
        raise ConfigError(
            f"[lora] cannot train new tokens of model type {network.config.model_type!r}, whose"
            f" embedding is a {type(embedding).__name__}; train the weights themselves (lora.rank"
            " = 0)"
        )
    generator = torch.Generator().manual_seed(seed)
    for layer in [embedding] if is_tied(network) else [embedding, head]:
        width = layer.embedding_dim if layer is embedding else layer.in_features
        rows = torch.empty(len(new_ids), width).normal_(std=_init_std(network), generator=generator)
        layer.register_parameter(
            ROWS, torch.nn.Parameter(rows.to(layer.weight.device, layer.weight.dtype))
        )
        layer.first_new = new_ids[0]
    embedding.forward = partial(_embed, embedding, embedding.forward, scale)


def _embed(
    layer: Any, frozen: Callable[[torch.Tensor], torch.Tensor], scale: Any, ids: torch.Tensor
) -> torch.Tensor:
    """Look ids up in the frozen matrix, or in the new rows where they are theirs."""
    found = frozen(ids.clamp(max=layer.num_embeddings - 1))
    places = ids - layer.first_new
    is_new = (places >= 0) & (places < len(layer.new_rows))
    new = torch.nn.functional.embedding(places.clamp(0, len(layer.new_rows) - 1), layer.new_rows)
    new = new if scale is None else new * scale.to(new.dtype)
    return torch.where(is_new[..., None], new.to(found.dtype), found)


def _init_std(network: PreTrainedModel) -> float:
    return float(getattr(network.config, "initializer_range", None) or 0.02)


def head_weight(network: PreTrainedModel) -> torch.Tensor:
    """Return the matrix of the LM head, [V, D], new rows in their places; gathered here under
    ZeRO-3."""
    head = network.get_output_embeddings()
    weight: torch.Tensor = head.weight
    layer = head if hasattr(head, ROWS) else network.get_input_embeddings()
    if not hasattr(layer, ROWS):
        return weight
    return with_rows(weight, layer.new_rows, layer.first_new)


def with_rows(weight: torch.Tensor, rows: torch.Tensor, first: int) -> torch.Tensor:
    """Return `weight`, [V, D], with `rows` from row `first` on, longer where it ends before they
    do."""
    return torch.cat([weight[:first], rows.to(weight.dtype), weight[first + len(rows) :]])


def is_tied(network: PreTrainedModel) -> bool:
    """Return whether the LM head is the embedding."""
    return network.get_output_embeddings().weight is network.get_input_embeddings().weight


def is_new_rows(name: str) -> bool:
    """Return whether a weight of a network is new rows, by its name."""
    return name.endswith(_SUFFIX)


def layer_of(name: str) -> str:
    """Return the layer that new rows belong to."""
    return name.removesuffix(_SUFFIX)
