"""Losses by source, added up on the device in one tensor: float64 [2, 1 + num_sources].

    column   fillers   source 0   source 1 ...
    row 0    -         sum of cross-entropies
    row 1    -         number of loss tokens

A filler is the row that a micro-batch without loss tokens sends through the head; its column is
never read.
"""

from collections.abc import Sequence

import torch

from shared.shard_format import Manifest


def empty_totals(num_sources: int, device: torch.device) -> torch.Tensor:
    """Return totals of zero."""
    return torch.zeros((2, 1 + num_sources), dtype=torch.float64, device=device)


def add_rows(totals: torch.Tensor, row_sources: torch.Tensor, row_losses: torch.Tensor) -> None:
    """Add rows, in place. `row_sources`: int64 [R], columns; `row_losses`: fp32 [R]."""
    totals.index_add_(
        1, row_sources, torch.stack([row_losses, torch.ones_like(row_losses)]).to(totals.dtype)
    )


def means(
    name: str, losses: Sequence[float], tokens: Sequence[float], manifest: Manifest
) -> dict[str, float | None]:
    """Return NAME/SOURCE -> mean cross-entropy of that source, None if it has no loss token."""
    pairs = zip(losses[1:], tokens[1:], manifest.sources, strict=True)
    return {
        f"{name}/{source.name}": total / count if count else None for total, count, source in pairs
    }
