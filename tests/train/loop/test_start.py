"""The start of a rank announces what is true, and its first weights depend on the seed alone."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import Result
from train_runs import train_here, weights, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def first_step(inputs: tuple[Path, Path], run: Path, *settings: str) -> Result:
    """Train one step at a learning rate of 0: the exported weights are those of the start."""
    words = [word for setting in settings for word in ("--set", setting)]
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run, "--max-steps", 1)
    done = train_here(*call, *words)
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize(("per_step", "per_micro_batch"), [(4, 1), (4, 2), (6, 3)])
def test_the_packs_of_a_step_are_announced_as_a_product(
    per_step: int, per_micro_batch: int, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    batch = f"batch={{packs_per_step={per_step}, packs_per_micro_batch={per_micro_batch}}}"
    stderr = first_step(inputs, tmp_path / "run", batch).stderr
    pattern = r"1 steps of (\d+) packs = (\d+) ranks x (\d+) micro-batches x (\d+) packs"
    match = re.search(pattern, stderr)
    assert match is not None, stderr
    total, ranks, micro_batches, packs = map(int, match.groups())
    assert (total, ranks, packs) == (per_step, 1, per_micro_batch)
    assert total == ranks * micro_batches * packs


def test_steps_of_conversations_are_announced_with_the_size_of_a_micro_batch(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    batch = "batch={conversations_per_step=7, packs_per_micro_batch=2}"
    stderr = first_step(inputs, tmp_path / "run", batch).stderr
    assert "1 steps of 7 conversations over 1 ranks, in micro-batches of up to 64 tokens" in stderr
    assert "cpu, torch.float32, attention per_sequence, ZeRO stage 0" in stderr


def test_random_weights_depend_on_the_seed_and_on_nothing_else(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Not on the ZeRO stage, though stage 3 could draw them in shards."""
    for name, setting in (("one", "run.seed=0"), ("sharded", "engine.zero_stage=3")):
        first_step(inputs, tmp_path / name, setting)
    first_step(inputs, tmp_path / "other", "run.seed=1")
    one, sharded, other = (weights(tmp_path / name) for name in ("one", "sharded", "other"))
    assert all(torch.equal(sharded[name], tensor) for name, tensor in one.items())
    embeddings = "model.embed_tokens.weight"
    assert not torch.equal(other[embeddings], one[embeddings])
