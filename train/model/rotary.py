"""Rotary angles for each sequence of a pack as it has them alone, where they hang on how long the
row is.

LongRoPE takes one set of frequencies up to the original length and another beyond; dynamic NTK
computes them from the length. transformers takes max(position_ids) of the whole row for it: one
long sequence would turn its neighbours' angles, and a slice of a row
(train/engine/sequence_parallel.py) may not hold the last position of its own sequences. What is
fixed, as most models' is, stays as it came. The others make the host wait for the device in each
forward pass: once for the bounds, and once a length in transformers' own code, which compares the
longest position on the host.

    length      3 3 3 | 9 9 9 9 9 9 9 9 9 | 2 2   up to an original length of 4 all count as 4
    calls       a a a | . . . . . . . . . | a a   one for the tokens of each length, with one more
                . . . | b b b b b b b b b | . .   position, length - 1, whose result is dropped
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

_FIXED = {
    "default",
    "linear",
    "yarn",
    "llama3",
    "proportional",
}  # frequencies that no length changes


class RowOfSequences:
    """The bounds of the row that the network is running, as its rotary modules see them."""

    def __init__(self) -> None:
        self.bounds: torch.Tensor | None = None  # int32 [S+1]; None for a row that is one sequence
        self.first = 0
        """The place in the row of the first token that this rank runs."""

    def note(
        self, _network: torch.nn.Module, _arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Take the bounds from a call of the network: a forward pre-hook."""
        self.bounds = options.get("cu_seq_lens_q")

    def lengths(self, num_tokens: int) -> torch.Tensor | None:
        """Return the length of the sequence of each token here, int64 [num_tokens] on the CPU."""
        if self.bounds is None:
            return None
        lengths = self.bounds.diff().long().cpu()
        return lengths.repeat_interleave(lengths)[self.first : self.first + num_tokens]


def separate_rotary(network: PreTrainedModel) -> RowOfSequences | None:
    """Make rotary modules that look at the length of the row look at each sequence's, in place;
    None without any."""
    modules = [module for module in network.base_model.modules() if _hangs_on_length(module)]
    if not modules:
        return None
    row = RowOfSequences()
    network.base_model.register_forward_pre_hook(row.note, with_kwargs=True)
    for module in modules:
        module.forward = partial(_by_sequence, module, module.forward, row)
    return row


def _rope_types(module: torch.nn.Module) -> dict[str, str]:
    """Return the rope type of a rotary module by the prefix of its buffers: one, or one for each
    type of layer."""
    found = vars(module).get("rope_type")
    if isinstance(found, dict):
        return {f"{layer_type}_": rope_type for layer_type, rope_type in found.items()}
    return {"": found} if isinstance(found, str) else {}


def _hangs_on_length(module: Any) -> bool:
    types = _rope_types(module)
    scaled = bool(types) and "long_mscale" in (
        module.config.rope_parameters or {}
    )  # Phi-3.5-MoE, with any type
    return scaled or any(rope_type not in _FIXED for rope_type in types.values())


def _by_sequence(
    module: Any,
    forward: Callable[..., Any],
    row: RowOfSequences,
    hidden: torch.Tensor,
    position_ids: torch.Tensor,
    *arguments: Any,
    **options: Any,
) -> Any:
    """Return what `forward` does, tensors [1, N, ...], with each token's sequence alone in the
    row."""
    lengths = row.lengths(position_ids.shape[-1])
    if lengths is None:
        _forget(module)
        return forward(hidden, position_ids, *arguments, **options)
    lengths = lengths.clamp(min=_original_length(module))
    together: list[torch.Tensor] = []
    was_tuple = False
    for length in sorted(set(lengths.tolist())):
        places = torch.nonzero(lengths == length)[:, 0].to(position_ids.device)
        ids = torch.cat([position_ids[:, places], position_ids.new_full((1, 1), length - 1)], dim=1)
        _forget(module)
        found = forward(hidden, ids, *arguments, **options)
        was_tuple = isinstance(found, tuple)
        parts = found if isinstance(found, tuple) else (found,)
        if not together:
            together = [part.new_empty((1, len(lengths), *part.shape[2:])) for part in parts]
        for whole, part in zip(together, parts, strict=True):
            whole[:, places] = part[:, :-1]
    return tuple(together) if was_tuple else together[0]


def _original_length(module: Any) -> int:
    """Return the length up to which sequences get the same angles, whatever their length: the least
    of its kinds'."""
    parameters = module.config.rope_parameters
    kinds = [parameters[prefix[:-1]] if prefix else parameters for prefix in _rope_types(module)]
    stated = [kind.get("original_max_position_embeddings") for kind in kinds]
    return int(min(length for length in (*stated, module.config.max_position_embeddings) if length))


def _forget(module: Any) -> None:
    """Undo what dynamic NTK keeps of the longest row so far: the next one gets what it would get as
    the first."""
    for prefix, rope_type in _rope_types(module).items():
        if "dynamic" in rope_type:
            setattr(
                module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").clone()
            )
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
