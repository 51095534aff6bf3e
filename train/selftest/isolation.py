"""Measures whether the sequences of a pack stay apart in a model: by changing tokens and looking at
what else changes.

    pack        a a a a | b b b | c c c c c
    neighbours  ? ? ? ? | b b b | ? ? ? ? ?     outputs of b must not change
    later       a a ? ? | b ? ? | c c c ? ?     outputs of a, b and c before the ? must not change
    alone       b b b                           unpacked, eager attention: the same outputs

Differences are relative to the root mean square of the outputs. A leak moves them by a twentieth to
more than one, rounding by far less than the tolerance.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from train.model.model import logit_scale

UNMOVED = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Where only other tokens changed, all shapes are the same and so should every bit be; the rest is
room for kernels that add up in no fixed order. The weakest leak seen with random weights
(Falcon-H1's) is 0.04."""
SAME = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Packed against alone, other shapes and kernels: fp32 differs by some 1e-6 here, and by more in
deep models; bf16 keeps 8 bits, 0.4 % per operation, which add up to a few percent."""

_MOST_KEPT = 4  # sequences whose neighbours are changed, one forward pass each


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check: what differed most, and by how much it may."""

    check: str
    measured: str
    worst: float
    tolerance: float

    @property
    def is_ok(self) -> bool:
        return self.worst <= self.tolerance  # false for a NaN too


def isolation_of(network: PreTrainedModel, ids: torch.Tensor, bounds: list[int]) -> list[Finding]:
    """Return the checks of the picture above for `ids` int64 [N] in sequences that end at `bounds`
    [S+1]."""
    unmoved, same = UNMOVED[network.dtype], SAME[network.dtype]
    with evaluating(network), torch.no_grad():
        before = outputs_of(network, ids, bounds)
        scale = root_mean_square(before)
        neighbours = max(
            _moved_by_neighbours(network, ids, bounds, before, kept)
            for kept in _kept(len(bounds) - 1)
        )
        later = _moved_by_later_tokens(network, ids, bounds, before)
        alone = _moved_when_alone(network, ids, bounds, logits_of(network, before))
    checks = (
        ("neighbours", "outputs after other sequences changed", neighbours / scale, unmoved),
        ("later tokens", "outputs after later tokens changed", later / scale, unmoved),
        ("packed = alone", "logits against each sequence alone, eager attention", alone, same),
    )
    return [
        Finding(check=check, measured=measured, worst=worst, tolerance=tolerance)
        for check, measured, worst, tolerance in checks
    ]


def outputs_of(network: PreTrainedModel, ids: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Return the last hidden states of a pack, [N, D], by the call that training makes."""
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
    """Return logits fp32 [N, V] as training sees them: the head on scaled hidden states."""
    head = network.get_output_embeddings().weight
    logits: torch.Tensor = hidden * logit_scale(network.config) @ head.t()
    return logits.float()


def root_mean_square(tensor: torch.Tensor) -> float:
    return max(float(tensor.float().square().mean().sqrt()), 1e-30)


@contextmanager
def evaluating(network: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and back in the mode that was."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


@contextmanager
def eager_attention(network: PreTrainedModel) -> Iterator[None]:
    """With the attention that transformers itself defines for the model, and back."""
    chosen = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation(chosen)


def _kept(num_sequences: int) -> list[int]:
    """Up to four sequences, the first and the last among them."""
    count = min(num_sequences, _MOST_KEPT)
    return sorted(
        {round(place * (num_sequences - 1) / max(1, count - 1)) for place in range(count)}
    )


def _moved_by_neighbours(
    network: PreTrainedModel, ids: torch.Tensor, bounds: list[int], before: torch.Tensor, kept: int
) -> float:
    own = slice(bounds[kept], bounds[kept + 1])
    changed = _others(network, ids)
    changed[own] = ids[own]
    return _largest(outputs_of(network, changed, bounds)[own] - before[own])


def _moved_by_later_tokens(
    network: PreTrainedModel, ids: torch.Tensor, bounds: list[int], before: torch.Tensor
) -> float:
    earlier = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for start, end in pairwise(bounds):
        earlier[start : start + (end - start + 1) // 2] = True
    changed = torch.where(earlier, ids, _others(network, ids))
    return _largest((outputs_of(network, changed, bounds) - before)[earlier])


def _moved_when_alone(
    network: PreTrainedModel, ids: torch.Tensor, bounds: list[int], packed: torch.Tensor
) -> float:
    worst = 0.0
    with eager_attention(network):
        for start, end in pairwise(bounds):
            alone = network(input_ids=ids[None, start:end], use_cache=False).logits[0].float()
            worst = max(worst, _largest(alone - packed[start:end]) / root_mean_square(alone))
    return worst


def _largest(difference: torch.Tensor) -> float:
    """A NaN counts as infinite: max() would lose it."""
    return float(difference.float().abs().nan_to_num(nan=float("inf")).max())


def _others(network: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return ids that differ from `ids` at every place."""
    size = int(network.get_input_embeddings().weight.shape[0])
    changed: torch.Tensor = (ids + max(1, size // 3)) % size
    return changed
