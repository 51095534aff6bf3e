"""Attention that keeps the sequences of a pack apart by their bounds; no mask over the whole row is
built.

Each function has the signature of transformers' attention functions and takes `cu_seq_lens_q` from
the keyword arguments that the model passes on. The first call fails for a model that does not pass
them. Letters: N tokens, H query heads, K key heads, D head size.
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


def choose_attention(kernel: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Return the transformers name of `kernel` ("auto" or a key of FUNCTIONS).

    Raises PrerequisiteError for a kernel that this device, dtype or installation lacks.
    """
    # Both kernels for whole rows exist for half precision on GPUs only.
    half_on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    has_flash = find_spec("flash_attn") is not None
    if kernel == "auto":
        kernel = "per_sequence" if not half_on_gpu else "flash" if has_flash else "varlen"
    if kernel != "per_sequence" and not half_on_gpu:
        raise PrerequisiteError(
            f"model.attention = {kernel!r} needs a GPU and bf16; this run has {device.type} and"
            f" {dtype}. Use per_sequence"
        )
    if kernel == "flash" and not has_flash:
        raise PrerequisiteError(
            "model.attention = 'flash' needs the package flash-attn; install it, or use varlen"
        )
    return register_attention(kernel)


def register_attention(kernel: str) -> str:
    """Register `kernel` with transformers and return the name to load a model with.

    Without a mask function beside it, transformers builds no mask. Nor does it search position_ids
    for sequences, which would make the host wait for the device in every forward pass.
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
    """Causal attention, one sequence after another: the work is the sum of squared lengths, not the
    square of the sum."""
    # The host needs the bounds as numbers: on a GPU this kernel waits for it in every layer.
    bounds = _checked_bounds(module, attention_mask, options).tolist()
    if options.get("softcap") is not None:
        raise ConfigError(
            f"{type(module).__name__} caps its attention scores, which needs model.attention ="
            " 'flash'"
        )
    window = options.get("sliding_window")
    outputs = []
    for start, end in pairwise(bounds):
        mask = None  # or bool [length, length], true where key <= query < key + window
        if window is not None and end - start > window:
            position = torch.arange(end - start, device=query.device)
            distance = position[:, None] - position
            mask = (distance >= 0) & (distance < window)
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
    """FlashAttention 2's kernel for rows of several sequences."""
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
        # A window of w tokens holds the query itself and w - 1 tokens before it.
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
    """torch's kernel for rows of several sequences."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = _checked_bounds(module, attention_mask, options)
    if options.get("softcap") is not None or options.get("dropout"):
        raise ConfigError(
            f"{type(module).__name__} caps its attention scores or has attention dropout, which"
            " needs model.attention = 'flash'"
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
        # (-1, 0): all tokens before the query and none after it.
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
    """Return cu_seqlens int32 [S+1]. Raises ConfigError if sequences would see each other or a mask
    would be ignored."""
    bounds = options.get("cu_seq_lens_q")
    name = type(module).__name__
    if bounds is None:
        raise ConfigError(
            f"{name} does not pass sequence bounds to its attention, so the sequences of a pack"
            " would see each other; use another model"
        )
    if (
        # An attention sink (s_aux) takes a part of the softmax, which no kernel here provides.
        attention_mask is not None
        or options.get("s_aux") is not None
        or options.get("is_causal") is False
    ):
        raise ConfigError(
            f"{name} needs a mask, attention sinks or attention to later tokens, which training"
            " does not support; use another model"
        )
    assert isinstance(bounds, torch.Tensor)
    return bounds
