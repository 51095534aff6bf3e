"""The batches of a step are the same for any number of ranks, as few as fit, and never from damaged
packs."""

import threading
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_sets import random_packs, write_shard_set
from train_runs import RECIPE, losses, train_here, weights, write_inputs

from shared.errors import ChecksumError
from shared.shard_format import npy_header
from shared.shard_reader import ShardSet, open_shard_set
from train.config import LossConfig
from train.data.loader import StepBatch, StepLoader
from train.data.micro_batch import MicroBatch
from train.data.step_order import Unit, make_order
from train.data.step_plan import origins

VOCAB, MAX_SEQ_LEN = 61, 64
UNITS: tuple[Unit, ...] = ("pack", "conversation")


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Twelve packs in three shards."""
    packs = random_packs(num_packs=12, max_seq_len=MAX_SEQ_LEN, vocab_size=VOCAB, seed=2)
    path = tmp_path_factory.mktemp("sets") / "set"
    return open_shard_set(
        write_shard_set(path, packs, max_seq_len=MAX_SEQ_LEN, vocab_size=VOCAB, packs_per_shard=5)
    )


def loader_of(
    shard_set: ShardSet,
    unit: Unit,
    *,
    per_step: int,
    rank: int = 0,
    world_size: int = 1,
    per_micro_batch: int = 1,
) -> StepLoader:
    num_units = shard_set.num_packs if unit == "pack" else shard_set.num_sequences
    order = make_order(
        unit=unit,
        fingerprint="f",
        seed=0,
        num_units=num_units,
        units_per_step=per_step,
        epochs=1,
        max_steps=None,
    )
    return StepLoader(
        shard_set=shard_set,
        order=order,
        loss=LossConfig(),
        rank=rank,
        world_size=world_size,
        packs_per_micro_batch=per_micro_batch,
    )


def sequences_of(batch: MicroBatch) -> list[bytes]:
    """The token ids of each sequence of a micro-batch; a filler holds none."""
    if batch.uniform_weight == 0.0 and batch.input_ids.shape[1] == 1:
        return []
    ids = batch.input_ids[0].numpy()
    bounds = batch.cu_seqlens.tolist()
    return [ids[a:b].tobytes() for a, b in pairwise(bounds)]


@pytest.mark.parametrize(("unit", "step"), product(UNITS, range(2)))
def test_any_number_of_ranks_runs_the_same_step(unit: Unit, step: int, shard_set: ShardSet) -> None:
    alone = loader_of(shard_set, unit, per_step=5).make(step)
    expected = sorted(sequence for batch in alone.micro_batches for sequence in sequences_of(batch))
    for world_size, per_micro_batch in product((1, 2, 3, 7, 16), (1, 2)):
        steps = [
            loader_of(
                shard_set,
                unit,
                per_step=5,
                rank=rank,
                world_size=world_size,
                per_micro_batch=per_micro_batch,
            ).make(step)
            for rank in range(world_size)
        ]
        batches = [batch for rank in steps for batch in rank.micro_batches]
        assert sorted(sequence for batch in batches for sequence in sequences_of(batch)) == expected
        assert len({len(rank.micro_batches) for rank in steps}) == 1
        assert all(b.input_ids.shape[1] <= per_micro_batch * MAX_SEQ_LEN for b in batches)
        assert sum(batch.token_share for batch in batches) == pytest.approx(1.0)
        counts = (alone.ids.tolist(), alone.num_tokens, alone.num_loss_tokens)
        for rank in steps:
            assert (rank.ids.tolist(), rank.num_tokens, rank.num_loss_tokens) == counts


def test_a_rank_runs_sequences_in_the_order_of_their_origins(shard_set: ShardSet) -> None:
    for unit, rank in product(UNITS, range(2)):
        loader = loader_of(shard_set, unit, per_step=6, rank=rank, world_size=2)
        batches = loader.make(1).micro_batches
        run = [sequence for batch in batches for sequence in sequences_of(batch)]
        rows = origins(loader.plan(1))[rank][:, 1].tolist()  # in this set row N is sequence N
        assert run == [shard_set.sequence(row).tokens.astype(np.int64).tobytes() for row in rows]


@pytest.mark.parametrize("start", [0, 2, 3])
def test_steps_are_those_from_the_start_to_the_end_of_the_run(
    start: int, shard_set: ShardSet
) -> None:
    loader = loader_of(shard_set, "pack", per_step=5)
    batches = list(loader.steps(start))
    assert [batch.step for batch in batches] == list(range(start, 3))
    for batch in batches:
        expected = loader.make(batch.step)
        assert batch.ids.tolist() == expected.ids.tolist()
        for one, other in zip(batch.micro_batches, expected.micro_batches, strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist()


def test_one_step_is_prepared_ahead(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = [threading.Event() for _ in range(3)]
    make = StepLoader.make

    def watched(self: StepLoader, step: int) -> StepBatch:
        begun[step].set()
        return make(self, step)

    monkeypatch.setattr(StepLoader, "make", watched)
    steps = loader_of(shard_set, "pack", per_step=5).steps(0)
    next(steps)
    assert begun[1].wait(timeout=60)
    assert not begun[2].is_set()
    steps.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("per_micro_batch", "most"), [(1, 13), (2, 7), (12, 1)])
def test_conversations_need_as_few_micro_batches_as_their_tokens_allow(
    per_micro_batch: int, most: int, shard_set: ShardSet
) -> None:
    """Twelve full packs hold all conversations."""
    loader = loader_of(
        shard_set,
        "conversation",
        per_step=shard_set.num_sequences,
        per_micro_batch=per_micro_batch,
    )
    batch = loader.make(0)
    assert len(batch.micro_batches) <= most
    assert batch.num_positions == batch.num_tokens == shard_set.manifest.totals.tokens
    assert batch.num_loss_tokens == shard_set.manifest.totals.loss_tokens


def test_a_step_counts_the_fillers_of_rows_that_ranks_share(tmp_path: Path) -> None:
    packs = [[([1, 2, 3], [0, 1, 1])], [([4, 5, 6, 7], [0, 0, 1, 1])], [([1, 2], [0, 1])]]
    path = write_shard_set(tmp_path / "set", packs, max_seq_len=4, vocab_size=VOCAB)
    loaders = [
        replace(
            loader_of(open_shard_set(path), "pack", per_step=3, rank=rank, world_size=4),
            sequence_parallel=2,
        )
        for rank in range(4)
    ]
    batches = [loader.make(0) for loader in loaders]
    assert {batch.num_tokens for batch in batches} == {9}
    num_positions = 4 + 4 + 2 + 2  # the fourth micro-batch is a filler
    assert {batch.num_positions for batch in batches} == {num_positions}
    sizes = [part.input_ids.shape[1] for batch in batches for part in batch.micro_batches]
    assert sum(sizes) == num_positions
    whole = loader_of(open_shard_set(path), "pack", per_step=3, world_size=2).make(0)
    pairs = zip(batches[0].micro_batches, batches[1].micro_batches, strict=True)
    for row, slices in zip(whole.micro_batches, pairs, strict=True):
        joined = torch.cat([part.input_ids for part in slices], dim=1)
        assert torch.equal(joined[:, : row.input_ids.shape[1]], row.input_ids)


def damage(path: Path, column: str, index: int, value: int) -> None:
    file = path / "shards" / "00000" / f"{column}.npy"
    data = np.load(file)
    data[index] = value
    file.write_bytes(npy_header(data.dtype.str, data.shape) + data.tobytes())


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("column", "index", "value", "message"),
    [
        ("tokens", 4, VOCAB + 5, "holds token 66; expected 0 to"),
        ("tokens", 4, -1, "holds token -1; expected 0 to"),
        ("loss_mask", 3, 0, "has 2 loss tokens in loss_mask.npy and 3"),
        ("loss_mask", 0, 1, "trains the first token|has 4 loss tokens"),
        ("seq_offsets", 1, 6, "that do not rise"),
        ("seq_offsets", 2, 40, "that do not rise"),
        ("seq_offsets", 1, 10**12, "that do not rise"),
    ],
)
def test_damage_is_named_before_it_trains(
    unit: Unit, column: str, index: int, value: int, message: str, tmp_path: Path
) -> None:
    packs = [[([1, 2, 3, 4], [0, 0, 1, 1]), ([5, 6], [0, 1])], [([7, 8], [0, 1])]]
    path = write_shard_set(tmp_path / "set", packs, max_seq_len=8, vocab_size=VOCAB)
    damage(path, column, index, value)
    loader = loader_of(open_shard_set(path), unit, per_step=2 if unit == "pack" else 3)
    with pytest.raises(ChecksumError, match=message):
        loader.make(0)


@pytest.mark.slow
def test_a_run_counted_in_conversations_resumes_where_it_stopped(tmp_path: Path) -> None:
    recipe_text = RECIPE.replace("packs_per_step = 4", "conversations_per_step = 9").replace(
        "epochs = 3", "epochs = 1"
    )
    shards, recipe = write_inputs(tmp_path, recipe=recipe_text)
    call = ("--shards", shards, "--recipe", recipe, "--output")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train_here(*call, whole)
    assert result.exit_code == 0
    num_sequences = open_shard_set(shards).num_sequences
    assert len(losses(whole)) == -(-num_sequences // 9)
    assert f"{len(losses(whole))} steps of 9 conversations" in result.stderr
    assert train_here(*call, stopped, "--stop-after", 2).exit_code == 75
    other = train_here(*call, stopped, "--set", "batch={conversations_per_step=8}")
    assert other.exit_code == 3
    assert "was begun with conversations_per_step = 9, now it is 8" in other.stderr
    assert train_here(*call, stopped).exit_code == 0
    assert losses(stopped) == losses(whole)
    assert all((tensor == weights(stopped)[name]).all() for name, tensor in weights(whole).items())
