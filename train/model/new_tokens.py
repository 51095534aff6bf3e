"""Embedding rows of tokens that the mixture added, trained where all other weights are frozen
(under LoRA).

    embedding and LM head   [ 0 1 2 ... first-1 | first ... first+n-1 | ... ]
                              frozen              new_rows [n, D]       frozen (padding)

The base model has learned nothing for these tokens, even if it has rows for their ids, so their
rows start random. They are separate parameters beside the frozen matrix, which may be shorter and
is never copied. peft's layer for this (`trainable_token_indices`) does not work under DeepSpeed;
the exported adapter has its format.
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
    """Add trained rows for `new_ids`, which are consecutive, to embedding and LM head; all ranks
    get the same values.

    Tied weights stay tied and share the rows. Raises ConfigError for an embedding that does more
    than look up rows.
    """
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    scale = getattr(embedding, "embed_scale", None)  # Gemma has one
    if type(embedding).forward is not torch.nn.Embedding.forward and scale is None:
        raise ConfigError(
            f"[lora] cannot train new tokens of model type {network.config.model_type!r}, whose"
            f" embedding is a {type(embedding).__name__}; train all weights (lora.rank = 0)"
        )
    std = float(getattr(network.config, "initializer_range", None) or 0.02)
    # Drawn on the CPU, so that any device gets the same values.
    generator = torch.Generator().manual_seed(seed)
    for layer in [embedding] if is_tied(network) else [embedding, head]:
        width = layer.embedding_dim if layer is embedding else layer.in_features
        rows = torch.empty(len(new_ids), width).normal_(std=std, generator=generator)
        layer.register_parameter(
            ROWS, torch.nn.Parameter(rows.to(layer.weight.device, layer.weight.dtype))
        )
        layer.first_new = new_ids[0]
    embedding.forward = partial(_embed, embedding, embedding.forward, scale)


def _embed(
    layer: Any, frozen: Callable[[torch.Tensor], torch.Tensor], scale: Any, ids: torch.Tensor
) -> torch.Tensor:
    """Look up new ids in the new rows and all others in the frozen matrix."""
    # Both look-ups run for all tokens: then no shape depends on data, and the host need not wait.
    old = frozen(ids.clamp(max=layer.num_embeddings - 1))
    index = ids - layer.first_new
    is_new = (index >= 0) & (index < len(layer.new_rows))
    new = torch.nn.functional.embedding(index.clamp(0, len(layer.new_rows) - 1), layer.new_rows)
    new = new if scale is None else new * scale.to(new.dtype)
    return torch.where(is_new[..., None], new.to(old.dtype), old)


def head_weight(network: PreTrainedModel) -> torch.Tensor:
    """Return the matrix of the LM head, [V, D], with the new rows; ZeRO-3 gathers it here."""
    head = network.get_output_embeddings()
    weight: torch.Tensor = head.weight
    layer = head if hasattr(head, ROWS) else network.get_input_embeddings()
    if not hasattr(layer, ROWS):
        return weight
    return with_rows(weight, layer.new_rows, layer.first_new)


def with_rows(weight: torch.Tensor, rows: torch.Tensor, first: int) -> torch.Tensor:
    """Return `weight`, [V, D], with `rows` from row `first` on, longer than before if needed."""
    return torch.cat([weight[:first], rows.to(weight.dtype), weight[first + len(rows) :]])


def is_tied(network: PreTrainedModel) -> bool:
    """Return whether the LM head is the embedding."""
    return network.get_output_embeddings().weight is network.get_input_embeddings().weight


def is_new_rows(name: str) -> bool:
    """Return whether `name` is that of new rows."""
    return name.endswith(_SUFFIX)


def layer_of(name: str) -> str:
    """Return the layer that new rows belong to."""
    return name.removesuffix(_SUFFIX)
