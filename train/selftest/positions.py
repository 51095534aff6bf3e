"""Measures whether positions in a pack mean what they mean alone, up to the longest sequence of a
set.

short a | long b b b b b b b b b b b b | short c         and each of them alone, in the model as it
came

Every token runs through the layers, but attends to itself and the few before it in its sequence
only, packed and alone: work and memory grow with the length, not with its square. So what hangs on
positions is compared as far as they go (angles and their scale, learned embeddings, temperatures),
in fp32; the attention kernel is train/selftest/isolation.py's part.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from train.selftest.isolation import (
    SAME,
    Finding,
    evaluating,
    logits_of,
    outputs_of,
    root_mean_square,
)

LOCAL = "sft_local"
MOST_TOKENS = 2**15
_SHORT = (31, 5)
_REACH = 4
_SHARPER = 16.0
"""Random weights make attention almost even; with larger scores angles show in the outputs."""


def register_local() -> str:
    """Register attention to the last few tokens with transformers; return its name there."""
    AttentionInterface.register(LOCAL, _local)
    return LOCAL


def position_check(packed: PreTrainedModel, plain: PreTrainedModel, *, longest: int) -> Finding:
    """Compare a pack with a sequence of `longest` tokens in `packed` with each of its sequences
    alone in `plain`.

    The two have the same weights and attend by `LOCAL`.
    """
    bounds = [0, _SHORT[0], _SHORT[0] + longest, _SHORT[0] + longest + _SHORT[1]]
    size = int(plain.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, size, (bounds[-1],), generator=generator).to(plain.device)
    worst = 0.0
    with evaluating(packed), evaluating(plain), torch.no_grad():
        found = outputs_of(packed, ids, bounds)
        for start, end in pairwise(bounds):
            alone = outputs_alone(plain, ids[start:end])
            difference = logits_of(packed, found[start:end]) - logits_of(plain, alone)
            moved = float(difference.abs().nan_to_num(nan=float("inf")).max())
            worst = max(worst, moved / root_mean_square(logits_of(plain, alone)))
    return Finding(
        check="positions",
        measured=(
            f"logits of a pack with a sequence of {longest} tokens against each sequence alone"
        ),
        worst=worst,
        tolerance=SAME[torch.float32],
    )


def outputs_alone(network: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states [N, D] of one sequence, by the model's own forward pass."""
    hidden = network.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    assert isinstance(hidden, torch.Tensor)
    return hidden


def _local(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, N, D]
    key: torch.Tensor,  # [1, K, N, D]
    value: torch.Tensor,  # [1, K, N, D]
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    num_tokens = query.shape[2]
    bounds = options.get("cu_seq_lens_q")
    place = torch.arange(num_tokens, device=query.device)
    if bounds is not None:
        place = place - torch.repeat_interleave(bounds[:-1], bounds.diff())  # in its sequence
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = _SHARPER * float(options.get("scaling") or query.shape[-1] ** -0.5)
    scores = torch.stack(
        [
            (scale * (query * key.roll(back, dims=2)).sum(-1)).masked_fill(place < back, -torch.inf)
            for back in range(_REACH)
        ]
    )  # [reach, 1, H, N]
    shares = scores.softmax(dim=0)
    output = sum(shares[back, ..., None] * value.roll(back, dims=2) for back in range(_REACH))
    assert isinstance(output, torch.Tensor)
    return output.transpose(1, 2).contiguous(), None
