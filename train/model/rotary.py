"""Rotary angles that depend on the length of the row, computed for each sequence of a pack as if it
were alone.

LongRoPE has one set of frequencies up to the original length and another beyond; dynamic NTK
computes them from the length. transformers takes max(position_ids) of the whole row as the length:
one long sequence would change the angles of its neighbours, and a slice of a row
(train/engine/sequence_parallel.py) may lack the last position of its sequences. Most models have
fixed frequencies and are left alone. The others make the host wait for the device in each forward
pass: once for the bounds, and once for each length in transformers, which compares the longest
position on the host.

    length      3 3 3 | 9 9 9 9 9 9 9 9 9 | 2 2   up to an original length of 4 all count as 4
    calls       a a a | . . . . . . . . . | a a   one for the tokens of each length, with one more
                . . . | b b b b b b b b b | . .   position, length - 1, whose result is dropped
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

# Rope types whose frequencies do not depend on a length.
_FIXED = {"default", "linear", "yarn", "llama3", "proportional"}


class RowOfSequences:
    """The bounds of the row that runs through the network, for its rotary modules."""

    def __init__(self) -> None:
        self.bounds: torch.Tensor | None = None  # int32 [S+1]; None for a row that is one sequence
        self.first = 0  # position in the row of the first token that this rank runs

    def note(
        self, _network: torch.nn.Module, _arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Take the bounds from a call of the network; this is a forward pre-hook."""
        self.bounds = options.get("cu_seq_lens_q")

    def lengths(self, num_tokens: int) -> torch.Tensor | None:
        """Return the length of the sequence of each token, int64 [num_tokens] on the CPU."""
        if self.bounds is None:
            return None
        lengths = self.bounds.diff().long().cpu()
        return lengths.repeat_interleave(lengths)[self.first : self.first + num_tokens]


def separate_rotary(network: PreTrainedModel) -> RowOfSequences | None:
    """Make rotary modules whose angles depend on a length use that of each sequence, in place.
    Return None if there are none."""
    modules: list[Any] = []
    for module in network.base_model.modules():
        types = _rope_types(module)
        # Phi-3.5-MoE has a scale that depends on the length, whatever its rope type.
        has_long_scale = types and "long_mscale" in (module.config.rope_parameters or {})
        if has_long_scale or not _FIXED.issuperset(types.values()):
            modules.append(module)
    if not modules:
        return None
    row = RowOfSequences()
    network.base_model.register_forward_pre_hook(row.note, with_kwargs=True)
    for module in modules:
        module.forward = partial(_by_sequence, module, module.forward, row)
    return row


def _rope_types(module: torch.nn.Module) -> dict[str, str]:
    """Return the rope types of a rotary module by the prefix of their buffers: one type, or one for
    each type of layer."""
    rope_type = vars(module).get("rope_type")
    if isinstance(rope_type, dict):
        return {f"{layer_type}_": name for layer_type, name in rope_type.items()}
    return {"": rope_type} if isinstance(rope_type, str) else {}


def _by_sequence(
    module: Any,
    forward: Callable[..., Any],
    row: RowOfSequences,
    hidden: torch.Tensor,
    position_ids: torch.Tensor,
    *arguments: Any,
    **options: Any,
) -> Any:
    """Return what `forward` gives for each sequence alone in its row: tensors [1, N, ...]."""
    lengths = row.lengths(position_ids.shape[-1])
    # Without bounds the row is one sequence, as in a plain call of the model.
    if lengths is None:
        _forget(module)
        return forward(hidden, position_ids, *arguments, **options)
    # Up to the original length (the least of all types) all sequences get the same angles, so one
    # call computes them.
    parameters = module.config.rope_parameters
    tables = [parameters[prefix[:-1]] if prefix else parameters for prefix in _rope_types(module)]
    originals = [table.get("original_max_position_embeddings") for table in tables]
    limits = filter(None, (*originals, module.config.max_position_embeddings))
    lengths = lengths.clamp(min=int(min(limits)))
    outputs: list[torch.Tensor] = []
    is_tuple = False
    for length in sorted(set(lengths.tolist())):
        # The further position makes transformers take this length; its angles are dropped.
        index = torch.nonzero(lengths == length)[:, 0].to(position_ids.device)
        ids = torch.cat([position_ids[:, index], position_ids.new_full((1, 1), length - 1)], dim=1)
        _forget(module)
        angles = forward(hidden, ids, *arguments, **options)
        is_tuple = isinstance(angles, tuple)
        tensors = angles if is_tuple else (angles,)
        if not outputs:
            outputs = [tensor.new_empty((1, len(lengths), *tensor.shape[2:])) for tensor in tensors]
        for output, tensor in zip(outputs, tensors, strict=True):
            output[:, index] = tensor[:, :-1]
    return tuple(outputs) if is_tuple else outputs[0]


def _forget(module: Any) -> None:
    """Reset what dynamic NTK keeps of the longest row so far, so that the order of rows does not
    matter."""
    for prefix, rope_type in _rope_types(module).items():
        if "dynamic" in rope_type:
            setattr(
                module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").clone()
            )
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
