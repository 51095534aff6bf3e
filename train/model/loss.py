"""Cross-entropy through the LM head, without the logits of the whole row.

The loss of a step is the sum over its rows of weight x cross-entropy. The weights hold the whole
normalisation and are known before the forward pass (train/data/loss_weights.py), so any split over
ranks and micro-batches has the same gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

# 64 MiB of fp32: 512 rows of a 32k vocabulary.
_LOGITS_PER_CHUNK = 1 << 24
# For larger vocabularies: with fewer rows matrix products get slow, and the head itself is larger
# than the chunk anyway.
_MIN_ROWS_PER_CHUNK = 256
# Products of 167 rows took up to twice the time per row of products of 160.
_ROW_MULTIPLE = 32


def weighted_cross_entropy(
    hidden: torch.Tensor,  # [R, D]
    head: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # int64 [R]
    weights: torch.Tensor,  # float32 [R]
    *,
    uniform: float | None,
    row_losses: torch.Tensor | None = None,  # float32 [R]
) -> torch.Tensor:
    """Return the sum over rows of weight x cross-entropy, fp32: by Liger's kernel on a GPU, in
    chunks of rows elsewhere.

    Each row's cross-entropy, without its weight, is written into `row_losses` if that is given.
    """
    if not torch.is_grad_enabled():
        # An autograd function computes gradients under no_grad as well, if its inputs require them.
        hidden, head = hidden.detach(), head.detach()
    if row_losses is None:
        row_losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    if hidden.device.type == "cuda" and uniform is not None:
        return liger_cross_entropy(hidden, head, targets, row_losses) * uniform
    return chunked_cross_entropy(hidden, head, targets, weights, row_losses)


def liger_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, row_losses: torch.Tensor
) -> torch.Tensor:
    """Return the sum of cross-entropies by Liger's fused kernel, which has no weights for single
    rows."""
    apply: Callable[..., torch.Tensor] = _LigerCrossEntropy.apply
    return apply(hidden, head, targets, row_losses)


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    row_losses: torch.Tensor,
) -> torch.Tensor:
    """Return the sum of weight x cross-entropy, over chunks of rows that share a buffer of
    logits."""
    apply: Callable[..., torch.Tensor] = _ChunkedCrossEntropy.apply
    return apply(hidden, head, targets, weights, row_losses)


class _LigerCrossEntropy(torch.autograd.Function):
    """Liger's kernel turns chunks of logits into losses and gradients; torch does the products
    around it.

    Liger's function around its kernel makes the host wait, since it counts the targets to ignore.
    There are none here, and nothing in either pass waits for the device. The gradient of the head
    is summed over chunks in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        row_losses: torch.Tensor,
    ) -> torch.Tensor:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        # A chunk takes as much memory as the hidden states; train/sizing/memory.py counts on it.
        chunk_rows = _rows_per_chunk(len(hidden), len(hidden) * hidden.shape[1] // len(head))
        buffer = torch.empty(
            (min(chunk_rows, len(hidden)), len(head)), dtype=hidden.dtype, device=hidden.device
        )
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = (
            torch.zeros(head.shape, dtype=torch.float32, device=head.device) if needs_head else None
        )
        for start in range(0, len(hidden), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            h = hidden[chunk]
            logits = torch.mm(h, head.t(), out=buffer[: len(h)])  # [rows, V]
            _run_ligers_kernel(
                logits, targets[chunk], row_losses[chunk], makes_gradient=needs_hidden or needs_head
            )
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[chunk])
            if grad_head is not None:
                _add_product(grad_head, logits.t(), h)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtype = head.dtype
        return row_losses.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*_scaled(ctx.saved_tensors, grad_loss, ctx.dtype), None, None)


def _run_ligers_kernel(
    logits: torch.Tensor, targets: torch.Tensor, row_losses: torch.Tensor, *, makes_gradient: bool
) -> None:
    """Write the cross-entropy of each row, and its gradient over the logits: one program for each
    row."""
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    from liger_kernel.ops.fused_linear_cross_entropy import MAX_FUSED_SIZE

    num_rows, vocab_size = logits.shape
    liger_cross_entropy_kernel[(num_rows,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=targets,
        Y_stride=targets.stride(0),
        loss_ptr=row_losses,
        loss_stride=row_losses.stride(0),
        n_cols=vocab_size,
        HAS_GRADIENTS=makes_gradient,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, 1 << (vocab_size - 1).bit_length()),
        num_warps=32,
        **LIGER_OPTIONS,
    )


LIGER_OPTIONS: dict[str, Any] = {
    "reduction": "none",
    "n_non_ignore": 1,  # the mean divides by it
    "ignore_index": -100,
    "weight_ptr": None,
    "HAS_WEIGHT": False,
    "sum_non_ignore_weight": 1,
    "weight_sum": 0.0,
    "label_smoothing": 0.0,
    "softcap": None,
    "HAS_SOFTCAPPING": False,
    "lse_square_scale": 0.0,
    "z_loss_ptr": None,
    "RETURN_Z_LOSS": False,
    "token_accuracy_ptr": None,
    "token_accuracy_stride": 0,
    "RETURN_TOKEN_ACCURACY": False,
    "predicted_tokens_ptr": None,
    "predicted_tokens_stride": 0,
    "RETURN_PREDICTED_TOKENS": False,
}
"""Other features of Liger's kernel, all off."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, as Liger does: logits are computed once and never
    kept.

    With p = softmax(h W^T) and g = weight x (p - onehot(target)): d hidden = g W, d head = g^T h.
    Logits are held as W h^T, [V, rows]: with few rows that takes a third less time on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        row_losses: torch.Tensor,
    ) -> torch.Tensor:
        num_rows = len(hidden)
        chunk_rows = _rows_per_chunk(num_rows, _LOGITS_PER_CHUNK // len(head))
        # Rows of weight 0 fill the last chunk.
        missing = -num_rows % chunk_rows
        hidden = pad(hidden, (0, 0, 0, missing))
        targets, weights = pad(targets, (0, missing)), pad(weights, (0, missing))
        buffer = torch.empty((len(head), chunk_rows), dtype=torch.float32, device=hidden.device)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = (
            torch.zeros(head.shape, dtype=torch.float32, device=head.device) if needs_head else None
        )
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            h, target, weight = hidden[chunk], targets[None, chunk], weights[chunk]
            # [V, rows]; torch does not write a product of halves into fp32 by itself.
            if head.dtype == buffer.dtype:
                logits = torch.mm(head, h.t(), out=buffer)
            else:
                logits = buffer.copy_(torch.mm(head, h.t()))
            # log-sum-exp with the maximum taken out, so that exp cannot overflow.
            target_logit = logits.gather(0, target)[0]
            top = logits.amax(dim=0)
            total = logits.sub_(top).exp_().sum(dim=0)
            losses = total.log() + top - target_logit
            row_losses[chunk] = losses[: num_rows - start]
            loss += (losses * weight).sum()
            # In place: the buffer turns from exp(logits - top) into the gradient.
            grad = logits.mul_(weight / total)
            grad = grad.scatter_add_(0, target, -weight[None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad.t(), head, out=grad_hidden[chunk])
            if grad_head is not None:
                _add_product(grad_head, grad, h)
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden[:num_rows], grad_head)
        ctx.dtype = head.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*_scaled(ctx.saved_tensors, grad_loss, ctx.dtype), None, None, None)


def _scaled(
    gradients: tuple[torch.Tensor | None, ...], factor: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor | None]:
    """Return gradients x factor, computed in fp32 and rounded once; in place for `dtype`."""
    # torch would first round a factor without dimensions to bf16, which moves world size / loss
    # tokens by up to 0.4 %.
    factor = factor.reshape(1)
    return [None if gradient is None else gradient.mul_(factor).to(dtype) for gradient in gradients]


def _rows_per_chunk(num_rows: int, most: int) -> int:
    """Return the size of nearly equal chunks of up to `most` rows: a multiple of _ROW_MULTIPLE."""
    most = max(_MIN_ROWS_PER_CHUNK, most)
    per_chunk = math.ceil(num_rows / max(1, math.ceil(num_rows / most)))
    return max(1, math.ceil(per_chunk / _ROW_MULTIPLE)) * _ROW_MULTIPLE


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left x right to `total`, fp32; on a GPU a product of halves is summed in fp32, too."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right))
