"""Steps read from a shard set: every sequence once per epoch, whole conversations only, damage
named."""

import json
from pathlib import Path

import numpy as np
import pytest
from shard_sets import random_packs, write_shard_set
from train_runs import RECIPE, train_here

from shared.errors import ChecksumError, ConfigError, DataError
from shared.hashing import digest
from shared.shard_format import npy_header
from shared.shard_reader import ShardSet, open_shard_set
from train.data.step_order import StepOrder, Unit, make_order
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


def order_of(shard_set: ShardSet, unit: Unit, *, per_step: int) -> StepOrder:
    num_units = shard_set.num_packs if unit == "pack" else shard_set.num_sequences
    return make_order(
        unit=unit,
        fingerprint="f",
        seed=0,
        num_units=num_units,
        units_per_step=per_step,
        epochs=1,
        max_steps=None,
    )


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
def test_an_epoch_holds_every_sequence_once(unit: Unit, shard_set: ShardSet) -> None:
    order = order_of(shard_set, unit, per_step=5)
    plans = [
        plan_step(shard_set, order, step, world_size=3, packs_per_micro_batch=1)
        for step in range(order.total_steps)
    ]
    rows = np.concatenate([rank for plan in plans for rank in origins(plan)])
    assert sorted(rows[:, 1].tolist()) == list(range(shard_set.num_sequences))
    if unit == "conversation":
        assert all(sum(map(len, origins(plan))) == 5 for plan in plans[:-1])


def test_steps_of_conversations_refuse_fragments(tmp_path: Path) -> None:
    packs = [[([1, 2, 3], [0, 1, 1])], [([4, 5], [0, 1])]]
    path = write_shard_set(
        tmp_path / "set", packs, max_seq_len=4, vocab_size=VOCAB, origins=[[(0, 7, 0)], [(0, 7, 3)]]
    )
    shard_set = open_shard_set(path)
    sizes = {"world_size": 1, "packs_per_micro_batch": 1}
    plan = plan_step(shard_set, order_of(shard_set, "pack", per_step=2), 0, **sizes)
    assert len(plan.packs) == 2
    with pytest.raises(DataError, match="row 7 was split, a fragment of it begins at token 3"):
        plan_step(shard_set, order_of(shard_set, "conversation", per_step=2), 0, **sizes)
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


@pytest.mark.parametrize(
    ("value", "message"), [(0, "holds sequences 0 to 0"), (-3, "holds"), (900, "holds")]
)
def test_a_pack_whose_bounds_are_damaged_is_named(value: int, message: str, tmp_path: Path) -> None:
    packs = [[([1, 2], [0, 1])], [([7, 8], [0, 1])]]
    path = write_shard_set(tmp_path / "set", packs, max_seq_len=8, vocab_size=VOCAB)
    file = path / "shards" / "00000" / "pack_offsets.npy"
    offsets = np.load(file)
    offsets[1] = value
    file.write_bytes(npy_header(offsets.dtype.str, offsets.shape) + offsets.tobytes())
    with pytest.raises(ChecksumError, match=f"pack 0 {message}"):
        open_shard_set(path).pack(0)
