"""Feed-forward layers in tiles: their wide activations exist for one part of a row at a time.

A layer of hidden size D and intermediate size I keeps about 3 I numbers per token for its backward
pass. In tiles it keeps D per token and computes the rest again, tile by tile. Positions do not
interact, so only rounding changes. This helps long rows under gradient checkpointing, where the
recomputed layer decides the memory peak.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shared.errors import ConfigError

Forward = Callable[[torch.Tensor], torch.Tensor]


def tile_mlps(network: PreTrainedModel, tiles: int) -> None:
    """Make the `mlp` of every layer run in `tiles` tiles, in place. Raises ConfigError for a
    network without any."""
    layers = [part for part in network.base_model.modules() if "mlp" in dict(part.named_children())]
    if not layers:
        raise ConfigError(
            f"model.mlp_tiles = {tiles}, but {type(network).__name__} has no layers named mlp; set"
            " it to 1"
        )
    for layer in layers:
        layer.mlp.forward = partial(_in_tiles, layer.mlp.forward, tiles)


def _in_tiles(forward: Forward, tiles: int, hidden: torch.Tensor) -> torch.Tensor:
    """[1, N, D] -> [1, N, D]. The number of tiles is fixed, since ZeRO-3 expects the same calls in
    every step."""
    outputs = [
        checkpoint(forward, tile, use_reentrant=False) for tile in hidden.tensor_split(tiles, dim=1)
    ]
    return torch.cat(outputs, dim=1)
