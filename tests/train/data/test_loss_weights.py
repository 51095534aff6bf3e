"""The weights of a step are its whole normalisation: they sum to what the norm says."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sets import write_shard_set

from shared.shard_reader import Pack, open_shard_set
from train.config import LossConfig
from train.data.loss_weights import sample_weights, uniform_weight

VOCAB = 61


def test_uniform_weights_are_those_of_the_norm() -> None:
    assert uniform_weight(LossConfig(norm="token"), 40) == 1 / 40
    assert uniform_weight(LossConfig(norm="token"), 0) == 1.0  # nothing to divide, and no zero
    assert uniform_weight(LossConfig(norm="sum", divisor=64.0), 40) == 1 / 64
    assert uniform_weight(LossConfig(norm="sample"), 40) is None


def test_fragments_count_together_and_copies_apart(tmp_path: Path) -> None:
    one = [([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1])]
    two = [([6, 7, 8, 9], [0, 1, 1, 1]), ([1, 2, 3], [0, 1, 1]), ([5, 6], [0, 0])]
    # Rows: 10, 11 (first fragment) | 11 (second fragment), 10 again (a repeat), 12 without loss.
    origins = [[(0, 10, 0), (0, 11, 0)], [(0, 11, 2), (0, 10, 0), (0, 12, 0)]]
    path = write_shard_set(
        tmp_path / "s", [one, two], max_seq_len=16, vocab_size=VOCAB, origins=origins
    )
    shards = open_shard_set(path)
    weights = sample_weights([shards.pack(0), shards.pack(1)])
    third, quarter = 1 / 3, 1 / 4
    assert np.allclose(weights[0], [third / 2, third / 2, third * quarter])
    assert np.allclose(weights[1], [third * quarter] * 3 + [third / 2] * 2)


def pack_of(samples: list[tuple[int, int]]) -> Pack:
    """A pack of whole samples (row, number of loss tokens)."""
    masks = [[0] + [1] * count for _, count in samples]
    return Pack(
        np.zeros(sum(map(len, masks)), np.int32),
        np.concatenate(masks).astype(np.uint8),
        np.cumsum([0, *map(len, masks)]),
        np.array([(0, row, 0) for row, _ in samples], np.int64),
    )


@settings(deadline=None, max_examples=60)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=12), cut=st.integers(0, 11))
def test_each_sample_with_loss_weighs_the_same_wherever_packs_are_cut(
    counts: list[int], cut: int
) -> None:
    samples = list(enumerate(counts))
    packs = [pack_of(part) for part in (samples[:cut], samples[cut:]) if part]
    weights = np.concatenate(sample_weights(packs))
    with_loss = [count for count in counts if count]
    shares = np.repeat([1 / count / len(with_loss) for count in with_loss], with_loss)
    assert weights == pytest.approx(shares)
