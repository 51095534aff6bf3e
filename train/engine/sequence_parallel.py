"""Sequence parallelism: the ranks of a group share every row, so that a sequence may be longer than
one GPU holds.

Each rank of a group of P runs a slice of the tokens through the layers. For attention the group
exchanges: a rank gets all tokens of a share of the heads, attends within the bounds of the
sequences, and hands the outputs back (DeepSpeed Ulysses, Jacobs et al. 2023). The bounds are those
of the whole row: DeepSpeed's stock kernels do not take them and would let sequences see each other.

A gradient is the sum over the slices, which is what the engine's sum over ranks makes of it.
"""

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from shared.errors import ConfigError
from train.engine.process_group import Ranks
from train.model.attention import FUNCTIONS


def sequence_group(ranks: Ranks, size: int) -> dist.ProcessGroup | None:
    """Return the group of `size` neighbouring ranks that this one shares its rows with; None for a
    size of 1.

    Every rank must call it. `size` divides their number.
    """
    if size == 1:
        return None
    groups = [
        dist.new_group(list(range(first, first + size)))
        for first in range(0, ranks.world_size, size)
    ]
    group = groups[ranks.rank // size]
    assert isinstance(group, dist.ProcessGroup)
    return group


def heads_to_share(config: PretrainedConfig, size: int) -> tuple[int, int]:
    """Return the model's heads and key heads. Raises ConfigError where `size` ranks cannot share
    them out."""
    values, name = (
        config.to_dict(),
        f"engine.sequence_parallel = {size} with model type {config.model_type!r}",
    )
    heads, key_heads = (
        getattr(config, "num_attention_heads", None),
        values.get("num_key_value_heads"),
    )
    if not isinstance(heads, int) or not isinstance(key_heads, int):
        raise ConfigError(
            f"{name}, whose config states no num_key_value_heads to share out; set it to 1"
        )
    if values.get("kv_lora_rank") or values.get("v_head_dim"):
        raise ConfigError(
            f"{name}, whose value heads (v_head_dim) are not as wide as its query heads; set it"
            " to 1"
        )
    if heads % size or (key_heads % size and size % key_heads):
        raise ConfigError(
            f"engine.sequence_parallel = {size} does not divide the model's {heads} heads and"
            f" {key_heads} key heads; use a divisor of both"
        )
    return heads, key_heads


def register_ulysses(kernel: str, config: PretrainedConfig, group: dist.ProcessGroup) -> str:
    """Register `kernel` (a key of FUNCTIONS), run by the whole group, with transformers; return its
    name there.

    Raises ConfigError for a model whose heads do not divide over the group.
    """
    from transformers import AttentionInterface

    size = dist.get_world_size(group)
    heads, key_heads = heads_to_share(config, size)
    attention = import_module(
        "deepspeed.runtime.sequence_parallel.ulysses_sp"
    ).UlyssesSPAttentionHF(
        attn=FUNCTIONS[kernel],
        batch_size=1,
        attn_head_count=heads,
        attn_head_size=config.to_dict().get("head_dim") or config.hidden_size // heads,
        kv_head_count=key_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=group,
        seq_length_is_variable=True,
    )

    def shared(*tensors: Any, **options: Any) -> tuple[torch.Tensor, None]:
        output, _ = attention(*tensors, **options)
        return output, None

    name = f"sft_ulysses_{kernel}"
    AttentionInterface.register(name, shared)
    return name
