"""Attention that keeps the sequences of a pack apart, from their bounds alone: no mask over the
whole row is built.

Each function has the shape that transformers gives its attention functions and takes
`cu_seq_lens_q` from the keyword arguments that the model passes through; a model that does not pass
them is refused at the first call. Letters: N tokens, H query heads, K key heads, D head size.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from shared.errors import ConfigError, PrerequisiteError

AttentionFunction = Callable[..., tuple[torch.Tensor, None]]


def choose_attention(wanted: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Return the transformers name of the kernel for `wanted` ("auto" or a key of FUNCTIONS).

    Raises PrerequisiteError for one that this device, dtype or installation lacks.
    """
    half_on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if wanted == "auto":
        wanted = (
            "per_sequence" if not half_on_gpu else "flash" if _has_flash_attention() else "varlen"
        )
    if wanted != "per_sequence" and not half_on_gpu:
        raise PrerequisiteError(
            f"model.attention = {wanted!r} needs a GPU and bf16; here is {device.type} with"
            f" {dtype}. Use per_sequence"
        )
    if wanted == "flash" and not _has_flash_attention():
        raise PrerequisiteError(
            "model.attention = 'flash' needs the package flash-attn; install it, or use varlen"
        )
    return register_attention(wanted)


def register_attention(kernel: str) -> str:
    """Register `kernel` with transformers and return the name to load a model with.

    No mask function goes with it. Then transformers builds no mask and does not look for sequences
    in position_ids either, which would make the host wait for the device in every forward pass.
    """
    from transformers import AttentionInterface

    name = f"sft_{kernel}"
    AttentionInterface.register(name, FUNCTIONS[kernel])
    return name


def per_sequence(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, N, D]
    key: torch.Tensor,  # [1, K, N, D]
    value: torch.Tensor,  # [1, K, N, D]
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention, one sequence after another: work is the sum of squared lengths, not the
    square of their sum."""
    bounds = _checked_bounds(module, attention_mask, options).tolist()
    if options.get("softcap") is not None:
        raise ConfigError(
            f"{type(module).__name__} caps its attention scores, which needs model.attention ="
            " 'flash'"
        )
    window = options.get("sliding_window")
    outputs = []
    for start, end in pairwise(bounds):
        mask = (
            _window_mask(end - start, window, query.device)
            if window is not None and end - start > window
            else None
        )
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=options.get("dropout", 0.0),
                scale=options.get("scaling"),
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None  # [1, N, H, D]


def flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """FlashAttention 2's kernel for rows of many sequences."""
    bounds = _checked_bounds(module, attention_mask, options)
    window = options.get("sliding_window")
    output = import_module("flash_attn").flash_attn_varlen_func(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),  # [N, heads, D]
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=options["max_length_q"],
        max_seqlen_k=options["max_length_q"],
        dropout_p=options.get("dropout", 0.0),
        softmax_scale=options.get("scaling"),
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=options.get("softcap") or 0.0,
    )
    return output[None], None


def varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """torch's own kernel for rows of many sequences."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = _checked_bounds(module, attention_mask, options)
    if options.get("softcap") is not None or options.get("dropout"):
        raise ConfigError(
            f"{type(module).__name__} needs score caps or dropout; that needs model.attention ="
            " 'flash'"
        )
    window = options.get("sliding_window")
    output = varlen_attn(
        query[0].transpose(0, 1),  # [N, H, D]
        key[0].transpose(0, 1),  # [N, K, D]
        value[0].transpose(0, 1),
        bounds,
        bounds,
        options["max_length_q"],
        options["max_length_q"],
        scale=options.get("scaling"),
        window_size=(-1, 0) if window is None else (window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output[None], None


FUNCTIONS: dict[str, AttentionFunction] = {
    "per_sequence": per_sequence,
    "flash": flash,
    "varlen": varlen,
}


def _checked_bounds(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, options: dict[str, Any]
) -> torch.Tensor:
    """Return cu_seqlens int32 [S+1]. Raises ConfigError for what would let sequences see each
    other."""
    bounds = options.get("cu_seq_lens_q")
    what = type(module).__name__
    if bounds is None:
        raise ConfigError(
            f"{what} does not pass sequence bounds to its attention: its packs would leak; use"
            " another"
        )
    if (
        attention_mask is not None
        or options.get("s_aux") is not None
        or options.get("is_causal") is False
    ):
        raise ConfigError(
            f"{what} needs a mask, attention sinks or attention to later tokens; it can't be"
            " trained yet"
        )
    assert isinstance(bounds, torch.Tensor)
    return bounds


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Return bool [length, length], true where key <= query < key + window."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _has_flash_attention() -> bool:
    return find_spec("flash_attn") is not None
