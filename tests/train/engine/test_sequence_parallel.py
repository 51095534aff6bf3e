"""Rows that two ranks share: what is learnt is what one rank learns, and sequences of a pack stay
apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from shard_sets import random_packs, write_shard_set
from train_runs import VOCAB, losses, train_apart, train_here, weights, write_inputs

from shared.shard_reader import open_shard_set
from train.config import LossConfig
from train.data.loader import StepLoader
from train.data.micro_batch import make_micro_batch
from train.data.sequence_slice import take_slice
from train.data.step_order import make_order

NO_DROPOUT = ("--set", "model.config.attention_dropout=0.0")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_slices_put_together_are_the_row(size: int, tmp_path: Path) -> None:
    packs = random_packs(num_packs=1, max_seq_len=32, vocab_size=VOCAB)
    shard_set = open_shard_set(
        write_shard_set(tmp_path / "set", packs, max_seq_len=32, vocab_size=VOCAB)
    )
    pack = shard_set.pack(0)
    row_weights = np.arange(1, pack.loss_mask.sum() + 1).astype(np.float32)
    row = make_micro_batch([pack], [row_weights], uniform_weight=None)
    slices = [take_slice(row, index, size) for index in range(size)]
    num_tokens = row.input_ids.shape[1]
    length = slices[0].input_ids.shape[1]
    assert {part.input_ids.shape for part in slices} == {(1, length)}
    assert torch.equal(
        torch.cat([part.input_ids for part in slices], dim=1)[:, :num_tokens], row.input_ids
    )
    assert torch.equal(
        torch.cat([part.position_ids for part in slices], dim=1)[:, :num_tokens], row.position_ids
    )
    found = [
        (int(place) + index * length, int(target), float(weight))
        for index, part in enumerate(slices)
        for place, target, weight in zip(part.rows, part.targets, part.weights, strict=True)
        if weight
    ]
    expected = list(zip(row.rows.tolist(), row.targets.tolist(), row.weights.tolist(), strict=True))
    assert found == expected
    for part in slices:
        assert part.cu_seqlens[-1] == length * size
        assert torch.equal(part.cu_seqlens[: len(row.cu_seqlens)], row.cu_seqlens)
        assert int(part.cu_seqlens.diff().max()) <= part.max_seqlen


def test_a_step_counts_the_fillers_of_shared_rows(tmp_path: Path) -> None:
    packs = [[([1, 2, 3], [0, 1, 1])], [([4, 5, 6, 7], [0, 0, 1, 1])], [([1, 2], [0, 1])]]
    shard_set = open_shard_set(
        write_shard_set(tmp_path / "set", packs, max_seq_len=4, vocab_size=VOCAB)
    )
    order = make_order(
        unit="pack", fingerprint=shard_set.manifest.fingerprint, seed=0, num_units=3, units_per_step=3, epochs=1.0,
        max_steps=None,
    )  # fmt: skip
    feeds = [
        StepLoader(
            shard_set=shard_set, order=order, loss=LossConfig(), rank=rank, world_size=4, packs_per_micro_batch=1,
            sequence_parallel=2,
        )
        for rank in range(4)
    ]  # fmt: skip
    batches = [feed.make(0) for feed in feeds]
    assert {batch.num_tokens for batch in batches} == {9}
    assert {batch.num_positions for batch in batches} == {
        4 + 4 + 2 + 2
    }  # the fourth micro-batch is a filler
    sizes = [part.input_ids.shape[1] for batch in batches for part in batch.micro_batches]
    assert sum(sizes) == 4 + 4 + 2 + 2


@pytest.mark.slow
def test_two_ranks_that_share_rows_learn_what_one_learns(tmp_path: Path) -> None:
    """ZeRO-3, odd rows, fewer key heads than ranks would like; and the stock behaviour, a leak,
    would show."""
    shards, recipe = write_inputs(tmp_path)
    arguments = (
        "--shards",
        shards,
        "--recipe",
        recipe,
        "--set",
        "engine.zero_stage=3",
        *NO_DROPOUT,
    )
    heads = ("--set", "model.config.num_key_value_heads=1")
    assert train_here(*arguments, *heads, "--output", tmp_path / "one").exit_code == 0
    shared = (
        "--nproc-per-node",
        2,
        "--set",
        "engine.sequence_parallel=2",
        "--output",
        tmp_path / "two",
    )
    done = train_apart(*arguments, *heads, *shared, "--set", "model.mlp_tiles=3")
    assert done.returncode == 0, done.stderr
    for (step, one), (other, two) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True
    ):
        assert step == other
        assert two == pytest.approx(one, rel=1e-5)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, rtol=0, atol=2e-3
        )  # AdamW turns rounding into steps of lr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("engine.sequence_parallel=0",), "sequence_parallel = 0; expected 1 or more"),
        (("engine.sequence_parallel=2",), "engine.sequence_parallel = 2 does not divide 1 ranks"),
    ],
)
def test_what_does_not_divide_is_refused(
    settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    shards, recipe = write_inputs(tmp_path)
    done = train_here(
        "--shards", shards, "--recipe", recipe, *(part for s in settings for part in ("--set", s))
    )
    assert done.exit_code == 3
    assert message in done.output
