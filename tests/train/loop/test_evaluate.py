"""Evaluation is exact for each source and any number of ranks, leaves training alone, and keeps the
best checkpoint."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_sets import random_packs, word_tokenizer, write_shard_set
from train_runs import RECIPE, VOCAB, records, train_apart, train_here, weights
from transformers import AutoModelForCausalLM

from shared.shard_reader import open_shard_set
from train.loop.evaluate import EvalLoader

NAMES = ("algebra", "chat")
NUM_EVAL_PACKS = 5

Inputs = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A set, a recipe, and an evaluation set of two sources."""
    folder = tmp_path_factory.mktemp("evaluate")
    train_packs = random_packs(num_packs=10, max_seq_len=32, vocab_size=VOCAB)
    shards = write_shard_set(folder / "set", train_packs, max_seq_len=32, vocab_size=VOCAB)
    packs = eval_packs()
    origins = [[(row % 2, row, 0) for row in range(len(pack))] for pack in packs]
    held_out = write_shard_set(
        folder / "held-out",
        packs,
        max_seq_len=32,
        vocab_size=VOCAB,
        origins=origins,
        source_names=NAMES,
    )
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    return shards, recipe, held_out


def eval_packs() -> list[list[tuple[list[int], list[int]]]]:
    return random_packs(num_packs=NUM_EVAL_PACKS, max_seq_len=32, vocab_size=VOCAB, seed=7)


def call(inputs: Inputs, run: Path, *more: object) -> list[object]:
    shards, recipe, held_out = inputs
    start = ("--shards", shards, "--recipe", recipe, "--eval-shards", held_out)
    return [*start, "--output", run, *more]


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if "eval_loss" in record]


def trained(run: Path) -> list[Any]:
    return [
        (record["step"], record["train_loss"], record["grad_norm"])
        for record in records(run)
        if "train_loss" in record
    ]


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    done = train_here(*call(inputs, run))
    assert done.exit_code == 0, done.output
    return run


def loss_alone(model: Any) -> tuple[list[float], list[int]]:
    """Sums of cross-entropy and their number for each source, one unpadded sequence at a time."""
    sums, counts = [0.0, 0.0], [0, 0]
    for pack in eval_packs():
        for row, (tokens, mask) in enumerate(pack):
            if sum(mask):
                ids, counted = torch.tensor([tokens]), torch.tensor([mask], dtype=torch.bool)
                labels = ids.where(counted, -100)
                sums[row % 2] += model(input_ids=ids, labels=labels).loss.item() * sum(mask)
                counts[row % 2] += sum(mask)
    return sums, counts


def test_the_last_evaluation_is_the_loss_of_the_exported_model(whole: Path) -> None:
    last = evaluations(whole)[-1]
    sums, counts = loss_alone(AutoModelForCausalLM.from_pretrained(whole / "model"))
    assert last["step"] == 8
    assert last["eval_loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    for name, total, count in zip(NAMES, sums, counts, strict=True):
        assert last[f"eval_loss/{name}"] == pytest.approx(total / count, rel=1e-5)
    assert last["eval_tokens"] == sum(counts)


def test_training_does_not_notice_evaluation(whole: Path, inputs: Inputs, tmp_path: Path) -> None:
    """Dropout is on: a random number drawn by an evaluation would change all steps after it."""
    run = tmp_path / "run"
    assert train_here("--shards", inputs[0], "--recipe", inputs[1], "--output", run).exit_code == 0
    assert evaluations(run) == []
    assert trained(run) == trained(whole)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(whole)[name])


def test_the_best_checkpoint_is_linked_and_kept(inputs: Inputs, tmp_path: Path) -> None:
    """A rate that ruins the model after the second step: the best is an old one, which retention
    would remove."""
    run = tmp_path / "run"
    ruin = ("--set", "optim.learning_rate=0.5", "--set", "schedule.warmup_ratio=0.3")
    ruin += ("--set", "checkpoint.keep_last=1")
    assert train_here(*call(inputs, run, *ruin)).exit_code == 0
    losses = {record["step"]: record["eval_loss"] for record in evaluations(run)}
    assert list(losses) == [2, 4, 6, 8]
    best = min(losses, key=lambda step: losses[step])
    assert best != 8
    link = run / "checkpoints" / "best"
    assert link.is_symlink()
    assert link.resolve() == (run / "checkpoints" / f"step-{best:08d}").resolve()
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == [f"step-{best:08d}", "step-00000008"]
    assert json.loads((link / "state.json").read_text())["eval_loss"] == losses[best]
    assert train_here("export", link, tmp_path / "model").exit_code == 0


def without_time(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if "second" not in key}
        for record in evaluations(run)
    ]


def test_a_step_that_was_saved_but_not_evaluated_is_evaluated_on_resume(
    whole: Path, inputs: Inputs, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train_here(*call(inputs, run, "--stop-after", 4)).exit_code == 75
    assert [record["step"] for record in evaluations(run)] == [2]
    assert train_here(*call(inputs, run)).exit_code == 0
    assert without_time(run) == without_time(whole)
    assert trained(run) == trained(whole)


def test_a_set_finds_what_was_held_out_of_it(whole: Path, inputs: Inputs, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(inputs[0], tmp_path / "set")
    shutil.copytree(inputs[2], tmp_path / "set" / "eval")
    run = tmp_path / "run"
    done = train_here(
        "--shards", tmp_path / "set", "--recipe", inputs[1], "--output", run, "--max-steps", 2
    )
    assert done.exit_code == 0
    assert f"evaluating on {tmp_path / 'set' / 'eval'}: 5 packs" in done.stderr
    assert [record["step"] for record in evaluations(run)] == [2]


def test_a_sample_of_packs_is_the_same_on_every_rank(inputs: Inputs) -> None:
    loader = EvalLoader(
        shard_set=open_shard_set(inputs[2]),
        max_packs=3,
        rank=0,
        world_size=1,
        packs_per_micro_batch=2,
        sequence_parallel=1,
    )
    ids = loader.pack_ids().tolist()
    assert len(set(ids)) == 3
    for world_size in (2, 4, 8):
        loaders = [
            dataclasses.replace(loader, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert all(other.pack_ids().tolist() == ids for other in loaders)
        assert len({len(list(other.micro_batches())) for other in loaders}) == 1
    every_pack = dataclasses.replace(loader, max_packs=0)
    assert every_pack.pack_ids().tolist() == list(range(NUM_EVAL_PACKS))


@pytest.mark.slow
def test_two_ranks_evaluate_the_same(inputs: Inputs, whole: Path, tmp_path: Path) -> None:
    """ZeRO-3, five packs on two ranks, other steps than those of the saves. Dropout depends on the
    rank, and is off."""
    still = ("--set", "model.config.attention_dropout=0.0", "--set", "eval.every_steps=3")
    assert train_here(*call(inputs, tmp_path / "one", *still)).exit_code == 0
    done = train_apart(*call(inputs, tmp_path / "two", *still, "--nproc-per-node", 2))
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in evaluations(tmp_path / "two")] == [3, 6, 8]
    one, two = evaluations(tmp_path / "one"), evaluations(tmp_path / "two")
    for key in ("eval_loss", "eval_loss/algebra", "eval_loss/chat"):
        expected = pytest.approx([record[key] for record in one], rel=1e-5)
        assert [record[key] for record in two] == expected


def test_a_set_of_another_tokenizer_or_of_longer_sequences_is_refused(
    inputs: Inputs, tmp_path: Path
) -> None:
    other = write_shard_set(
        tmp_path / "other",
        eval_packs(),
        max_seq_len=32,
        vocab_size=VOCAB,
        tokenizer_files=word_tokenizer(VOCAB + 1),
    )
    longer = write_shard_set(tmp_path / "longer", eval_packs(), max_seq_len=64, vocab_size=VOCAB)
    for held_out, message in (
        (other, "was made with another tokenizer"),
        (longer, "build the evaluation set with max"),
    ):
        done = train_here(*call((inputs[0], inputs[1], held_out), tmp_path / "run"))
        assert done.exit_code == 4
        assert message in done.stderr
