"""Packs become one row without padding; labels stay within a sequence; damage is named before it
trains."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ChecksumError
from shared.shard_reader import Pack
from train.data.micro_batch import (
    IGNORE,
    MicroBatch,
    check_pack,
    make_micro_batch,
    restarting_positions,
    shifted_labels,
)

VOCAB = 61
Sequence = list[tuple[int, bool]]  # token, and whether it is a target

SEQUENCES = st.lists(
    st.lists(st.tuples(st.integers(0, VOCAB - 1), st.booleans()), min_size=1, max_size=8),
    min_size=1,
    max_size=5,
)


def pack_of(sequences: list[Sequence], source: int = 0) -> Pack:
    """A pack of `sequences`, whose first tokens are never targets."""
    bounds = np.cumsum([0, *map(len, sequences)])
    mask = np.array([flag for sequence in sequences for _, flag in sequence], np.uint8)
    mask[bounds[:-1]] = 0
    tokens = np.array([token for sequence in sequences for token, _ in sequence], np.int32)
    origin = np.array([(source, row, 0) for row in range(len(sequences))], np.int64)
    return Pack(tokens, mask, bounds, origin)


def counting_weights(packs: list[Pack]) -> list[np.ndarray]:
    """Weights 1, 2, 3 ... over the loss tokens of all packs, so that each can be recognised."""
    counts = [int(pack.loss_mask.sum()) for pack in packs]
    numbers = np.arange(1, sum(counts) + 1, dtype=np.float32)
    return np.split(numbers, np.cumsum(counts)[:-1])


@settings(deadline=None, max_examples=80)
@given(packs=st.lists(SEQUENCES, min_size=1, max_size=3))
def test_a_row_holds_every_target_with_its_context_weight_and_source(
    packs: list[list[Sequence]],
) -> None:
    columns = [pack_of(sequences, source) for source, sequences in enumerate(packs)]
    batch = make_micro_batch(columns, counting_weights(columns), uniform_weight=None)
    expected = []
    for source, pack in enumerate(columns):
        for start, end in pairwise(pack.seq_offsets.tolist()):
            tokens, mask = pack.tokens[start:end].tolist(), pack.loss_mask[start:end].tolist()
            targets = [index for index in range(1, len(tokens)) if mask[index]]
            expected += [(tokens[:index], tokens[index], 1 + source) for index in targets]
    ids, bounds = batch.input_ids[0].tolist(), batch.cu_seqlens.tolist()
    actual = []
    for row, target, source in zip(batch.rows, batch.targets, batch.row_sources, strict=True):
        start = max(bound for bound in bounds if bound <= row)
        assert batch.position_ids[0, row] == row - start
        actual.append((ids[start : row + 1], int(target), int(source)))
    assert ids == [token for pack in columns for token in pack.tokens.tolist()]
    if expected:
        assert actual == expected
        assert batch.weights.tolist() == list(range(1, len(expected) + 1))
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())


def test_labels_are_shifted_within_a_sequence_only() -> None:
    tokens = np.array([1, 2, 3, 4, 5, 6, 7], np.int64)
    # The 1 on token 5, the first of its sequence, must not become a label of token 4.
    mask = np.array([0, 0, 1, 1, 1, 1, 1], np.uint8)
    labels = shifted_labels(tokens, mask, np.array([0, 4, 7]))
    assert labels.tolist() == [IGNORE, 3, 4, IGNORE, 6, 7, IGNORE]
    assert restarting_positions(np.array([0, 4, 7])).tolist() == [0, 1, 2, 3, 0, 1, 2]


def without_loss() -> MicroBatch:
    masked = pack_of([[(5, False), (6, False)], [(7, False)]])
    return make_micro_batch([masked], [np.empty(0, np.float32)], uniform_weight=0.5)


@pytest.mark.parametrize("batch", [make_micro_batch([], [], uniform_weight=0.5), without_loss()])
def test_a_micro_batch_without_loss_tokens_has_one_row_of_no_weight_and_no_source(
    batch: MicroBatch,
) -> None:
    assert batch.rows.tolist() == [0]
    assert batch.weights.tolist() == [0.0]
    assert batch.row_sources.tolist() == [0]
    assert batch.targets.tolist() == batch.input_ids[0, :1].tolist()
    assert batch.uniform_weight == 0.0
    assert (batch.cu_seqlens.dtype, batch.input_ids.dtype) == (torch.int32, torch.int64)


@settings(deadline=None, max_examples=80)
@given(sequences=SEQUENCES, position=st.integers(0, 39), damage=st.sampled_from(["token", "mask"]))
def test_every_flipped_token_or_mask_byte_is_named(
    sequences: list[Sequence], position: int, damage: str
) -> None:
    pack = pack_of(sequences)
    position %= len(pack.tokens)
    facts = {"num_loss_tokens": int(pack.loss_mask.sum()), "max_token_id": VOCAB - 1}
    check_pack(pack, 3, **facts, where="set")
    if damage == "token":
        pack.tokens[position] += VOCAB
    else:
        pack.loss_mask[position] ^= 1
    with pytest.raises(ChecksumError, match=r"set: pack 3 (holds token|has \d+ loss tokens)"):
        check_pack(pack, 3, **facts, where="set")


def test_a_loss_mask_that_moves_to_a_first_token_is_named() -> None:
    """Its number of loss tokens is right, so only the position shows the damage."""
    pack = pack_of([[(1, False), (2, True)]])
    pack.loss_mask[:] = [1, 0]
    with pytest.raises(ChecksumError, match="trains the first token of a sequence"):
        check_pack(pack, 0, num_loss_tokens=1, max_token_id=VOCAB, where="set")
