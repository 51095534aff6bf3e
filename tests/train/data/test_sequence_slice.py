"""Slices of a row, put together, are the row: tokens, positions, targets, weights and bounds."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.shard_reader import Pack
from train.data.micro_batch import MicroBatch, make_micro_batch
from train.data.sequence_slice import take_slice


def row_of(lengths: list[int], seed: int) -> MicroBatch:
    """A row of random tokens, half of them targets, whose weights are 1, 2, 3 ..."""
    rng = np.random.default_rng(seed)
    bounds = np.cumsum([0, *lengths])
    mask = rng.integers(0, 2, bounds[-1]).astype(np.uint8)
    mask[bounds[:-1]] = 0
    tokens = rng.integers(0, 61, bounds[-1]).astype(np.int32)
    pack = Pack(tokens, mask, bounds, np.zeros((len(lengths), 3), np.int64))
    weights = np.arange(1, mask.sum() + 1).astype(np.float32)
    return make_micro_batch([pack], [weights], uniform_weight=None)


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@example(lengths=[1], size=5, seed=0)  # the filler is longer than every sequence
def test_slices_put_together_are_the_row(lengths: list[int], size: int, seed: int) -> None:
    row = row_of(lengths, seed)
    slices = [take_slice(row, index, size) for index in range(size)]
    num_tokens, length = row.input_ids.shape[1], slices[0].input_ids.shape[1]
    assert {part.input_ids.shape for part in slices} == {(1, length)}
    for name in ("input_ids", "position_ids"):
        joined = torch.cat([getattr(part, name) for part in slices], dim=1)
        assert torch.equal(joined[:, :num_tokens], getattr(row, name))
    joined_rows = [
        (int(position) + part.first, int(target), float(weight))
        for part in slices
        for position, target, weight in zip(part.rows, part.targets, part.weights, strict=True)
        if weight
    ]
    rows = zip(row.rows.tolist(), row.targets.tolist(), row.weights.tolist(), strict=True)
    assert joined_rows == [item for item in rows if item[2]]
    for part in slices:
        assert part.cu_seqlens[-1] == length * size
        assert torch.equal(part.cu_seqlens[: len(row.cu_seqlens)], row.cu_seqlens)
        assert int(part.cu_seqlens.diff().max()) <= part.max_seqlen
    assert sum(part.token_share for part in slices) == pytest.approx(row.token_share)


def test_a_slice_without_targets_has_one_row_of_no_weight() -> None:
    pack = Pack(
        np.arange(4, dtype=np.int32),
        np.array([0, 0, 0, 1], np.uint8),
        np.array([0, 4]),
        np.zeros((1, 3), np.int64),
    )
    row = make_micro_batch([pack], [np.ones(1, np.float32)], uniform_weight=1.0)
    first = take_slice(row, 0, 2)
    assert (first.rows.tolist(), first.weights.tolist(), first.uniform_weight) == ([0], [0.0], 0.0)
    assert first.row_sources.tolist() == [0]
    assert take_slice(row, 1, 2).uniform_weight == 1.0
