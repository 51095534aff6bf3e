"""Steps read from a shard set: what they hold, who runs it, whole conversations only, damage
named."""

import json
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from shard_sets import random_packs, write_shard_set
from train_runs import RECIPE, losses, train_here, weights, write_inputs

from shared.errors import ChecksumError, ConfigError, DataError
from shared.hashing import digest
from shared.shard_format import npy_header
from shared.shard_reader import ShardSet, open_shard_set
from train.config import LossConfig
from train.data.loader import StepLoader
from train.data.micro_batch import MicroBatch
from train.data.step_order import Unit, make_order
from train.data.step_plan import check_conversations, origins, plan_step

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


def feed_of(
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
        shard_set=shard_set, order=order, loss=LossConfig(), rank=rank, world_size=world_size,
        packs_per_micro_batch=per_micro_batch,
    )  # fmt: skip


def sequences_of(batch: MicroBatch) -> list[bytes]:
    """The token ids of each sequence of a micro-batch; a filler holds none."""
    if batch.uniform_weight == 0.0 and batch.input_ids.shape[1] == 1:
        return []
    ids = batch.input_ids[0].numpy()
    bounds = batch.cu_seqlens.tolist()
    return [ids[a:b].tobytes() for a, b in pairwise(bounds)]


def test_every_sequence_reads_back_alone_and_knows_its_pack(shard_set: ShardSet) -> None:
    numbers = iter(range(shard_set.num_sequences))
    for pack_id in range(shard_set.num_packs):
        pack = shard_set.pack(pack_id)
        for start, end, origin in zip(
            pack.seq_offsets, pack.seq_offsets[1:], pack.seq_origin, strict=False
        ):
            number = next(numbers)
            alone = shard_set.sequence(number)
            assert alone.tokens.tolist() == pack.tokens[start:end].tolist()
            assert alone.loss_mask.tolist() == pack.loss_mask[start:end].tolist()
            assert alone.seq_offsets.tolist() == [0, end - start]
            assert alone.seq_origin.tolist() == [origin.tolist()]
            assert shard_set.pack_of(number) == pack_id
    assert next(numbers, None) is None
    with pytest.raises(IndexError):
        shard_set.sequence(shard_set.num_sequences)


@pytest.mark.parametrize("unit", UNITS)
def test_any_number_of_ranks_runs_the_same_step(unit: Unit, shard_set: ShardSet) -> None:
    for step in range(2):
        alone = feed_of(shard_set, unit, per_step=5).make(step)
        wanted = sorted(
            sequence for batch in alone.micro_batches for sequence in sequences_of(batch)
        )
        for world_size, per_micro_batch in product((1, 2, 3, 7, 16), (1, 2)):
            parts = [
                feed_of(
                    shard_set,
                    unit,
                    per_step=5,
                    rank=rank,
                    world_size=world_size,
                    per_micro_batch=per_micro_batch,
                ).make(step)
                for rank in range(world_size)
            ]
            found = [
                sequence
                for part in parts
                for batch in part.micro_batches
                for sequence in sequences_of(batch)
            ]
            assert sorted(found) == wanted
            assert len({len(part.micro_batches) for part in parts}) == 1
            for part in parts:
                assert part.ids.tolist() == alone.ids.tolist()
                assert (part.num_tokens, part.num_loss_tokens) == (
                    alone.num_tokens,
                    alone.num_loss_tokens,
                )
                assert all(
                    b.input_ids.shape[1] <= per_micro_batch * MAX_SEQ_LEN
                    for b in part.micro_batches
                )


@pytest.mark.parametrize("unit", UNITS)
def test_an_epoch_holds_every_sequence_once(unit: Unit, shard_set: ShardSet) -> None:
    order = feed_of(shard_set, unit, per_step=5).order
    plans = [
        plan_step(shard_set, order, step, world_size=3, packs_per_micro_batch=1)
        for step in range(order.total_steps)
    ]
    rows = np.concatenate([part for plan in plans for part in origins(plan)])
    assert sorted(rows[:, 1].tolist()) == list(range(shard_set.num_sequences))
    if unit == "conversation":
        assert all(sum(map(len, origins(plan))) == 5 for plan in plans[:-1])


def test_origins_are_in_the_order_that_a_rank_runs_them(shard_set: ShardSet) -> None:
    for unit, rank in product(UNITS, range(2)):
        feed = feed_of(shard_set, unit, per_step=6, rank=rank, world_size=2)
        run = [sequence for batch in feed.make(1).micro_batches for sequence in sequences_of(batch)]
        rows = origins(feed.plan(1))[rank][:, 1].tolist()  # in this set row N is sequence N
        assert run == [shard_set.sequence(row).tokens.astype(np.int64).tobytes() for row in rows]


def test_conversations_need_as_few_micro_batches_as_their_tokens_do(shard_set: ShardSet) -> None:
    feed = feed_of(shard_set, "conversation", per_step=shard_set.num_sequences)
    batch = feed.make(0)
    assert len(batch.micro_batches) <= 13  # twelve packs hold them all
    assert batch.num_positions == batch.num_tokens == shard_set.manifest.totals.tokens
    assert batch.num_loss_tokens == shard_set.manifest.totals.loss_tokens


def test_fragments_are_refused_where_conversations_are_counted(tmp_path: Path) -> None:
    packs = [[([1, 2, 3], [0, 1, 1])], [([4, 5], [0, 1])]]
    path = write_shard_set(
        tmp_path / "set", packs, max_seq_len=4, vocab_size=VOCAB, origins=[[(0, 7, 0)], [(0, 7, 3)]]
    )
    feed_of(open_shard_set(path), "pack", per_step=2).make(0)
    with pytest.raises(DataError, match="row 7 was split, a fragment of it begins at token 3"):
        feed_of(open_shard_set(path), "conversation", per_step=2).make(0)
    manifest = json.loads((path / "manifest.json").read_text())
    check_conversations(open_shard_set(path).manifest)
    manifest["sources"][0]["details"]["rows_split"] = 1
    del manifest["seal"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "seal": digest(manifest)}))
    with pytest.raises(ConfigError, match="1 rows of source 'made-up' were split"):
        check_conversations(open_shard_set(path).manifest)
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.replace("packs_per_step", "conversations_per_step"))
    result = train_here("--shards", path, "--recipe", recipe, "--output", tmp_path / "run")
    assert result.exit_code == 3
    assert "state the batch in packs_per_step or tokens_per_step" in result.stderr


def spoil(path: Path, column: str, index: int, value: int) -> None:
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
    spoil(path, column, index, value)
    feed = feed_of(open_shard_set(path), unit, per_step=2 if unit == "pack" else 3)
    with pytest.raises(ChecksumError, match=message):
        feed.make(0)


@pytest.mark.parametrize(
    ("value", "message"), [(0, "holds sequences 0 to 0"), (-3, "holds"), (900, "holds")]
)
def test_a_pack_whose_bounds_are_damaged_is_named(value: int, message: str, tmp_path: Path) -> None:
    packs = [[([1, 2], [0, 1])], [([7, 8], [0, 1])]]
    path = write_shard_set(tmp_path / "set", packs, max_seq_len=8, vocab_size=VOCAB)
    spoil(path, "pack_offsets", 1, value)
    with pytest.raises(ChecksumError, match=f"pack 0 {message}"):
        open_shard_set(path).pack(0)


@pytest.mark.slow
def test_a_run_counted_in_conversations_goes_on_where_it_stopped(tmp_path: Path) -> None:
    recipe_text = RECIPE.replace("packs_per_step = 4", "conversations_per_step = 9").replace(
        "epochs = 3", "epochs = 1"
    )
    shards, recipe = write_inputs(tmp_path, recipe=recipe_text)
    call = ("--shards", shards, "--recipe", recipe, "--output")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train_here(*call, whole)
    assert result.exit_code == 0
    num_sequences = open_shard_set(shards).num_sequences
    assert len(losses(whole)) == -(-num_sequences // 9)
    assert f"{len(losses(whole))} steps of 9 conversations" in result.stderr
    assert train_here(*call, parts, "--stop-after", 2).exit_code == 75
    other = train_here(*call, parts, "--set", "batch={conversations_per_step=8}")
    assert other.exit_code == 3
    assert "was begun with conversations_per_step = 9, now it is 8" in other.stderr
    assert train_here(*call, parts).exit_code == 0
    assert losses(parts) == losses(whole)
    assert all((tensor == weights(parts)[name]).all() for name, tensor in weights(whole).items())
