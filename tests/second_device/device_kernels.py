"""Plain formulas for operators that torch has for CUDA only: attention over whole rows, products
summed in fp32.

Liger's kernels need nothing here: Triton's interpreter runs them (TRITON_INTERPRET=1).
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def register(device: ModuleType) -> torch.library.Library:
    """Return the library of the kernels, which exist as long as it does."""
    host = device.on_host

    def up(tensor: Tensor) -> Tensor:
        made = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda"
        )
        host(made).copy_(tensor)
        return made

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        _k: Tensor,
        _mq: int,
        _mk: int,
        dropout: float,
        causal: bool,
        _debug: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, ...]:
        assert causal or window_size_right == 0
        assert not dropout
        assert query.dtype in (torch.bfloat16, torch.float16)
        assert bounds.dtype == torch.int32
        assert bounds.is_cuda
        output = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype)
        for rows, p, _q, _k, v in _sequences(
            *map(host, (query, key, value, bounds)), scale, window_size_left
        ):
            output[rows] = (p @ v).transpose(0, 1).to(query.dtype)
        unused = torch.zeros(2, dtype=torch.uint64)
        return (
            up(output),
            up(torch.zeros(query.shape[1], len(query))),
            up(unused),
            up(unused),
            up(torch.zeros(0)),
        )

    def attend_backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _out: Tensor,
        _lse: Tensor,
        bounds: Tensor,
        *_: Any,
        scale: float | None = None,
        window_size_left: int | None = None,
        **__: Any,
    ) -> tuple[Tensor, ...]:
        grads = [torch.zeros(tensor.shape) for tensor in (query, key, value)]
        factor, key_heads = scale or query.shape[-1] ** -0.5, key.shape[1]
        for rows, p, q, k, v in _sequences(
            *map(host, (query, key, value, bounds)), scale, window_size_left
        ):
            g = host(grad)[rows].float().transpose(0, 1)
            dp = g @ v.transpose(1, 2)
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * factor
            grads[0][rows] = (ds @ k).transpose(0, 1)
            # Several query heads share a key head.
            for total, by_head in zip(
                grads[1:], (ds.transpose(1, 2) @ q, p.transpose(1, 2) @ g), strict=True
            ):
                total[rows] = by_head.unflatten(0, (key_heads, -1)).sum(1).transpose(0, 1)
        return tuple(up(total.to(query.dtype)) for total in grads)

    def addmm(
        total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, **scales: float
    ) -> Tensor:
        return up(torch.addmm(*(host(t).to(out_dtype) for t in (total, left, right)), **scales))

    def addmm_out(
        total: Tensor,
        left: Tensor,
        right: Tensor,
        out_dtype: torch.dtype,
        *,
        out: Tensor,
        **scales: float,
    ) -> Tensor:
        host(out).copy_(
            torch.addmm(*(host(t).to(out_dtype) for t in (total, left, right)), **scales)
        )
        return out

    library = torch.library.Library("aten", "IMPL")
    for name, kernel in (
        ("_flash_attention_forward", attend),
        ("_flash_attention_backward", attend_backward),
        ("addmm.dtype", addmm),
        ("addmm.dtype_out", addmm_out),
    ):
        library.impl(name, kernel, "CUDA")
    return library


def _sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scale: float | None,
    window: int | None,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yield the rows, attention probabilities, query, key and value of each sequence, fp32 [heads,
    length, ...]."""
    repeats = query.shape[1] // key.shape[1]
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        rows = slice(start, end)
        q = query[rows].float().transpose(0, 1)
        k, v = (
            tensor[rows].float().transpose(0, 1).repeat_interleave(repeats, 0)
            for tensor in (key, value)
        )
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance < 0) | (
            distance > window if window is not None and window >= 0 else False
        )
        scores = (q @ k.transpose(1, 2)) * (scale or q.shape[-1] ** -0.5)
        yield rows, scores.masked_fill(hidden, -torch.inf).softmax(-1), q, k, v
