"""Measure whether positions in a pack mean what they mean alone, up to the longest sequence of a
set.

    short a | long b b b b b b b b b b b b | short c     against each alone, in the unchanged model

Every token runs through the layers, but attends only to itself and the few tokens before it in its
sequence, packed and alone: work and memory grow with the length, not with its square. Whatever
depends on positions is compared over the full length in fp32: angles and their scale, learned
embeddings, temperatures. train/selftest/isolation.py checks the attention kernel.
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
    relative_size,
)

LOCAL = "sft_local"
MOST_TOKENS = 2**15
_SHORT = (31, 5)
_REACH = 4
# Random weights make attention almost even; larger scores make angles show in the outputs.
_SHARPER = 16.0


def register_local() -> str:
    """Register attention to the last few tokens with transformers and return its name there."""
    AttentionInterface.register(LOCAL, _local)
    return LOCAL


def position_check(packed: PreTrainedModel, plain: PreTrainedModel, *, longest: int) -> Finding:
    """Compare a pack that holds a sequence of `longest` tokens, in `packed`, with each sequence
    alone, in `plain`.

    The two networks have the same weights and use the attention `LOCAL`. `longest` is more than 31,
    the length of the first sequence, since dynamic NTK keeps the longest one so far.
    """
    bounds = [0, _SHORT[0], _SHORT[0] + longest, _SHORT[0] + longest + _SHORT[1]]
    size = int(plain.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, size, (bounds[-1],), generator=generator).to(plain.device)
    worst = 0.0
    with evaluating(packed), evaluating(plain), torch.no_grad():
        outputs = outputs_of(packed, ids, bounds)
        for start, end in pairwise(bounds):
            alone = logits_of(plain, outputs_alone(plain, ids[start:end]))
            difference = logits_of(packed, outputs[start:end]) - alone
            worst = max(worst, relative_size(difference, alone))
    return Finding(
        check="positions",
        measurement=(
            f"logits of a pack with a sequence of {longest} tokens against each sequence alone"
        ),
        worst=worst,
        tolerance=SAME[torch.float32],
    )


def outputs_alone(network: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states [N, D] of one sequence by the forward pass of transformers."""
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
    position = torch.arange(num_tokens, device=query.device)
    if bounds is not None:
        position = position - torch.repeat_interleave(bounds[:-1], bounds.diff())
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = _SHARPER * float(options.get("scaling") or query.shape[-1] ** -0.5)
    # One score per query and distance `back`, [1, H, N]; none before the start of a sequence.
    scores = [
        (scale * (query * key.roll(back, dims=2)).sum(-1)).masked_fill(position < back, -torch.inf)
        for back in range(_REACH)
    ]
    shares = torch.stack(scores).softmax(dim=0)
    output = sum(shares[back, ..., None] * value.roll(back, dims=2) for back in range(_REACH))
    assert isinstance(output, torch.Tensor)
    return output.transpose(1, 2).contiguous(), None
