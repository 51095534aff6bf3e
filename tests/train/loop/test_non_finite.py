"""A row that makes the loss infinite: the run names it and stops, or skips its steps."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from shard_sets import random_packs, write_shard_set
from train_runs import RECIPE, VOCAB, losses, records, status, train_apart, train_here, weights

from shared.shard_reader import open_shard_set
from train.data.step_order import make_order
from train.loop import loop

BAD_PACK = 5
BAD_TOKEN = VOCAB


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A set whose pack 5 holds a token that no other pack holds, and a model whose embedding of it
    grows infinite.

    Weights must be finite: Gemma multiplies embeddings by the root of their width.
    """
    folder = tmp_path_factory.mktemp("inputs")
    packs = random_packs(num_packs=10, max_seq_len=32, vocab_size=VOCAB)
    packs[BAD_PACK][0][0][0] = BAD_TOKEN
    shards = write_shard_set(folder / "set", packs, max_seq_len=32, vocab_size=VOCAB + 1)
    config = transformers.GemmaConfig(
        vocab_size=VOCAB + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD_TOKEN] = 3e38
    model.save_pretrained(folder / "model")
    recipe = folder / "tiny.toml"
    rest = RECIPE[RECIPE.index("[optim]") :]
    recipe.write_text(f'name = "tiny"\n[model]\nname = "model"\n{rest}', encoding="utf-8")
    return shards, recipe


def bad_steps(shards: Path) -> list[int]:
    """Return the steps, counted from 1, that hold the bad pack."""
    shard_set = open_shard_set(shards)
    order = make_order(
        fingerprint=shard_set.manifest.fingerprint,
        seed=0,
        num_units=10,
        units_per_step=4,
        unit="pack",
        epochs=3,
        max_steps=None,
    )
    return [step + 1 for step in range(order.total_steps) if BAD_PACK in order.step(step)]


def test_a_stopped_run_names_the_rows_of_the_micro_batch_that_was_not_finite(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = train_here("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    assert result.exit_code == 4
    assert f"step {bad_steps(inputs[0])[0]}: the loss or a gradient is not finite" in result.stderr
    rows = open_shard_set(inputs[0]).pack(BAD_PACK).seq_origin[:, 1].tolist()
    names = ", ".join(f"made-up:{row}" for row in rows[:8])
    pattern = rf"The loss was not finite in rank 0 micro-batch \d, rows {names} \("
    assert re.search(pattern, result.stderr)
    assert status(run)["exit_code"] == 4


def without(monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """Make the loop forget the gradients of `steps`, as if they were never computed."""
    done: list[int] = []

    def update(engine: Any, *, learning_rate: float) -> torch.Tensor:
        done.append(len(done) + 1)
        if done[-1] not in steps:
            return real(engine, learning_rate=learning_rate)
        for group in engine.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return torch.tensor(True)

    real = loop.update
    monkeypatch.setattr(loop, "update", update)


def looking_at_weights(updates: list[torch.Tensor]) -> Any:
    """Return an `update` that notes some weights after each."""

    def update(engine: Any, *, learning_rate: float) -> torch.Tensor:
        skipped = real(engine, learning_rate=learning_rate)
        updates.append(engine.module.model.get_output_embeddings().weight.detach().clone())
        return skipped

    real = loop.update
    return update


def test_skipping_gives_the_weights_of_a_run_in_which_those_steps_have_no_gradient(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank; stopped and started in between, so that the count of skipped steps goes through
    a checkpoint."""
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--set", "run.on_non_finite=skip")
    steps = bad_steps(inputs[0])
    run = tmp_path / "skipped"
    assert train_here(*call, "--output", run, "--stop-after", steps[0] + 1).exit_code == 75
    assert train_here(*call, "--output", run).exit_code == 0
    with monkeypatch.context() as patched:
        without(patched, steps)
        assert train_here(*call, "--output", tmp_path / "left-out").exit_code == 0
    run_records = records(run)
    assert [record["skipped_steps"] for record in run_records] == [
        sum(bad <= record["step"] for bad in steps) for record in run_records
    ]
    assert [record["step"] for record in run_records if record["train_loss"] is None] == steps
    assert losses(run) == losses(tmp_path / "left-out")
    expected, got = weights(tmp_path / "left-out"), weights(run)
    for name in expected:
        assert torch.equal(expected[name].nan_to_num(7.0), got[name].nan_to_num(7.0)), name


def test_skipping_ends_when_its_budget_is_spent_however_often_the_run_is_started(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    call += ("--set", "run.on_non_finite=skip")
    steps = bad_steps(inputs[0])
    for _ in range(2):
        result = train_here(*call, "--set", f"run.max_skipped={len(steps) - 1}")
        assert result.exit_code == 4
        assert f"step {steps[-1]}: the loss or a gradient is not finite" in result.stderr
        assert f"run.max_skipped = {len(steps) - 1} steps were skipped before it" in result.stderr
    assert train_here(*call).exit_code == 0
    assert records(run)[-1]["skipped_steps"] == len(steps)


@pytest.mark.parametrize("stage", ["0", "3"])
def test_steps_that_the_host_has_not_read_yet_are_skipped_and_named_all_the_same(
    stage: str, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are read every fifth step only; a save reads them too. ZeRO knows at once, and no step
    follows."""
    settings = ("--set", "log.every_steps=5", "--set", f"engine.zero_stage={stage}")
    call = ("--shards", inputs[0], "--recipe", inputs[1], *settings, "--output")
    steps = bad_steps(inputs[0])
    updates: list[torch.Tensor] = []
    with monkeypatch.context() as patched:
        patched.setattr(loop, "update", looking_at_weights(updates))
        stopped = train_here(*call, tmp_path / "stopped", "--set", "checkpoint.every_steps=1000")
    assert stopped.exit_code == 4
    if stage == "3":
        assert len(updates) == steps[0]
    else:
        assert len(updates) > steps[0]
        last = updates[steps[0] - 1].nan_to_num(7.0)
        assert all(torch.equal(later.nan_to_num(7.0), last) for later in updates[steps[0] :])
    assert f"step {steps[0]}: the loss or a gradient is not finite" in stopped.stderr
    assert not list((tmp_path / "stopped" / "checkpoints").glob("step-*"))
    skip = ("--set", "run.on_non_finite=skip")
    assert train_here(*call, tmp_path / "read-late", *skip).exit_code == 0
    each = (*skip, "--set", "log.every_steps=1")
    assert train_here(*call, tmp_path / "read-at-once", *each).exit_code == 0
    late, at_once = (records(tmp_path / name) for name in ("read-late", "read-at-once"))
    assert [record["skipped_steps"] for record in late] == [
        at_once[record["step"] - 1]["skipped_steps"] for record in late
    ]
    for record in late:
        window = range((record["step"] - 1) // 5 * 5, record["step"])
        in_window = [at_once[step]["train_loss"] for step in window]
        finite = [loss for loss in in_window if loss is not None]
        assert record["train_loss"] == pytest.approx(sum(finite) / len(finite))
    expected, got = weights(tmp_path / "read-at-once"), weights(tmp_path / "read-late")
    for name in expected:
        assert torch.equal(expected[name].nan_to_num(7.0), got[name].nan_to_num(7.0)), name


@pytest.mark.slow
def test_two_ranks_skip_the_same_steps(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """One of them had a finite loss."""
    call = ("--shards", inputs[0], "--recipe", inputs[1])
    call += ("--set", "run.on_non_finite=skip", "--output")
    done = train_apart(*call, tmp_path / "two", "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    assert "The loss was not finite in rank " in done.stderr
    assert train_here(*call, tmp_path / "one").exit_code == 0
    assert [record["skipped_steps"] for record in records(tmp_path / "two")] == [
        record["skipped_steps"] for record in records(tmp_path / "one")
    ]
    pairs = zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True)
    for (step, one), (other, two) in pairs:
        assert step == other
        assert one is two is None or two == pytest.approx(one, rel=1e-5)
