"""Sequence parallelism: the ranks of a group share every row, so a sequence may be longer than one
GPU can hold.

Each rank of a group runs a slice of the tokens through the layers. For attention the ranks
exchange: each gets all tokens for a share of the heads, attends within the bounds of the sequences,
and sends the outputs back (DeepSpeed Ulysses, Jacobs et al. 2023). The bounds are those of the
whole row. DeepSpeed's kernels do not take bounds and would let sequences see each other.

A gradient is the sum over the slices, and the engine sums over the ranks.
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
    """Return the group of `size` neighbouring ranks that share rows with this one; None for a size
    of 1.

    `size` divides the number of ranks, and every rank must call this.
    """
    if size == 1:
        return None
    # Every rank has to create every group, in the same order.
    firsts = range(0, ranks.world_size, size)
    groups = [dist.new_group(list(range(first, first + size))) for first in firsts]
    group = groups[ranks.rank // size]
    assert isinstance(group, dist.ProcessGroup)
    return group


def heads_to_share(config: PretrainedConfig, size: int) -> tuple[int, int]:
    """Return the model's heads and key heads. Raises ConfigError if `size` ranks cannot share
    them."""
    values = config.to_dict()
    heads = getattr(config, "num_attention_heads", None)
    key_heads = values.get("num_key_value_heads")
    setting = f"engine.sequence_parallel = {size} with model type {config.model_type!r}"
    if not isinstance(heads, int) or not isinstance(key_heads, int):
        raise ConfigError(
            f"{setting}, whose config has no num_key_value_heads to divide; set it to 1"
        )
    # The exchange takes one head size for queries, keys and values.
    if values.get("kv_lora_rank") or values.get("v_head_dim"):
        raise ConfigError(
            f"{setting}, whose value heads (v_head_dim) are not as wide as its query heads; set it"
            " to 1"
        )
    # Fewer key heads than ranks are copied, if their number divides that of the ranks.
    if heads % size or (key_heads % size and size % key_heads):
        raise ConfigError(
            f"engine.sequence_parallel = {size} does not divide the model's {heads} heads and"
            f" {key_heads} key heads; use a common divisor"
        )
    return heads, key_heads


def register_ulysses(kernel: str, config: PretrainedConfig, group: dist.ProcessGroup) -> str:
    """Register `kernel` (a key of FUNCTIONS), shared by the ranks of `group`, with transformers;
    return its name there.

    Raises ConfigError for a model whose heads do not divide over the group.
    """
    from transformers import AttentionInterface

    heads, key_heads = heads_to_share(config, dist.get_world_size(group))
    ulysses = import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    attention = ulysses.UlyssesSPAttentionHF(
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
