"""Measure whether a model keeps the sequences of a pack apart: change tokens and see which outputs
move.

    pack        a a a a | b b b | c c c c c
    neighbours  ? ? ? ? | b b b | ? ? ? ? ?     outputs of b must not change
    later       a a ? ? | b ? ? | c c c ? ?     outputs of a, b and c before the ? must not change
    alone       b b b                           unpacked, eager attention: the same outputs

Differences are relative to the root mean square of the outputs. A leak moves them by 0.04 to more
than 1, rounding by far less than the tolerance.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from train.model.model import logit_scale

# If only other tokens change, shapes are the same and every bit should be. The tolerance is for
# kernels that add up in no fixed order; the weakest leak with random weights (Falcon-H1) is 0.04.
UNMOVED = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# Packed and alone have other shapes and kernels. fp32 differs by some 1e-6 here, by more in deep
# models; bf16 has 8 bits, so 0.4 % per operation, which add up to a few percent.
SAME = {torch.float32: 1e-3, torch.bfloat16: 0.1}

# Number of sequences whose neighbours are changed; each takes a forward pass.
_NUM_WITH_NEIGHBOURS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check: the largest difference, and the tolerance for it."""

    check: str
    measurement: str
    worst: float
    tolerance: float

    @property
    def is_ok(self) -> bool:
        return self.worst <= self.tolerance


def isolation_of(network: PreTrainedModel, ids: torch.Tensor, bounds: list[int]) -> list[Finding]:
    """Return the three checks of the picture above for `ids` int64 [N] in sequences with `bounds`
    [S+1]."""
    unmoved, same = UNMOVED[network.dtype], SAME[network.dtype]
    num_sequences = len(bounds) - 1
    num_checked = min(num_sequences, _NUM_WITH_NEIGHBOURS)
    vocab_size = int(network.get_input_embeddings().weight.shape[0])
    others = (ids + max(1, vocab_size // 3)) % vocab_size  # differ from `ids` at every position
    neighbours = alone = 0.0
    with evaluating(network), torch.no_grad():
        before = outputs_of(network, ids, bounds)
        # Neighbours: of up to four evenly spaced sequences, the first and the last among them.
        for number in range(num_checked):
            index = round(number * (num_sequences - 1) / max(1, num_checked - 1))
            sequence = slice(bounds[index], bounds[index + 1])
            changed = others.clone()
            changed[sequence] = ids[sequence]
            moved = outputs_of(network, changed, bounds)[sequence] - before[sequence]
            neighbours = max(neighbours, relative_size(moved, before))
        # Later: the second half of each sequence changes.
        earlier = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for start, end in pairwise(bounds):
            earlier[start : start + (end - start + 1) // 2] = True
        changed = torch.where(earlier, ids, others)
        moved = outputs_of(network, changed, bounds) - before
        later = relative_size(moved[earlier], before)
        # Alone: without a pack, the model decides on its mask and positions itself.
        packed = logits_of(network, before)
        with eager_attention(network):
            for start, end in pairwise(bounds):
                logits = network(input_ids=ids[None, start:end], use_cache=False).logits[0].float()
                alone = max(alone, relative_size(logits - packed[start:end], logits))
    checks = (
        ("neighbours", "outputs after other sequences changed", neighbours, unmoved),
        ("later tokens", "outputs after later tokens changed", later, unmoved),
        ("packed = alone", "logits against each sequence alone, eager attention", alone, same),
    )
    return [
        Finding(check=check, measurement=measurement, worst=worst, tolerance=tolerance)
        for check, measurement, worst, tolerance in checks
    ]


def outputs_of(network: PreTrainedModel, ids: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Return the last hidden states of a pack, [N, D], by the same call as in training."""
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=ids.device)
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)])
    longest = max(end - start for start, end in pairwise(bounds))
    hidden = network.base_model(
        input_ids=ids[None],
        position_ids=positions[None].to(ids.device),
        attention_mask=None,
        use_cache=False,
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=longest,
        max_length_k=longest,
    ).last_hidden_state[0]
    assert isinstance(hidden, torch.Tensor)
    return hidden


def logits_of(network: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return logits fp32 [N, V] as in training: the head on scaled hidden states."""
    head = network.get_output_embeddings().weight
    logits: torch.Tensor = hidden * logit_scale(network.config) @ head.t()
    return logits.float()


@contextmanager
def evaluating(network: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off while the block runs."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


@contextmanager
def eager_attention(network: PreTrainedModel) -> Iterator[None]:
    """Use the attention that transformers itself defines for the model, while the block runs."""
    implementation = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation(implementation)


def relative_size(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest |difference|, relative to the root mean square of `reference`.

    It is infinite if any value is not finite, since Python's max() would lose a NaN.
    """
    scale = float(reference.float().square().mean().sqrt())
    size = float(difference.float().abs().max())
    return size / max(scale, 1e-30) if math.isfinite(size + scale) else math.inf
