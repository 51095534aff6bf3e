"""A run that resumes with other ranks or another ZeRO stage learns what an uninterrupted one does.

Ranks add gradients in another order, so runs agree to about 1e-7; the tolerance of losses is 1e-5
relative. Lost moments, a step counted twice or decayed norms show as 1e-3 and more.
"""

from pathlib import Path

import pytest
import torch
from click.testing import Result
from train_runs import losses, records, train_apart, train_here, weights, write_inputs

import train.checkpoint.reshard
from shared.errors import ArtifactError

# Weight decay separates matrices from norms; tied weights are one parameter with two names.
SETTINGS = (
    "model.config.attention_dropout=0.0",
    "model.config.tie_word_embeddings=true",
    "optim.weight_decay=0.5",
    "log.every_steps=2",
)

Inputs = tuple[Path, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def uninterrupted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train_here(*arguments(inputs, run)).exit_code == 0
    return run


def arguments(inputs: Inputs, run: Path, *more: str) -> list[object]:
    flags = [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]
    return ["--shards", inputs[0], "--recipe", inputs[1], "--output", run, *flags]


def assert_same_learning(run: Path, uninterrupted: Path) -> None:
    for (step, loss), (other, expected) in zip(losses(run), losses(uninterrupted), strict=True):
        assert step == other
        assert loss == pytest.approx(expected, rel=1e-5)
    for name in ("learning_rate", "total_tokens"):
        assert [record[name] for record in records(run)] == [
            record[name] for record in records(uninterrupted)
        ]
    expected_weights = weights(uninterrupted)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=1e-5)


STAGES = (0, 3, 2, 0, 1)  # one step each, the last to the end


@pytest.mark.slow
def test_changes_of_stage_learn_the_same(
    inputs: Inputs, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for stage in STAGES[:-1]:
        done = train_here(*arguments(inputs, run, f"engine.zero_stage={stage}"), "--stop-after", 1)
        assert done.exit_code == 75, done.output
    assert not list((run / "checkpoints").glob(".tmp*"))
    assert train_here(*arguments(inputs, run, f"engine.zero_stage={STAGES[-1]}")).exit_code == 0
    assert_same_learning(run, uninterrupted)


@pytest.mark.slow
def test_two_ranks_then_one_then_two_learn_the_same(
    inputs: Inputs, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for num_ranks, steps in ((2, 3), (1, 2)):
        done = train_apart(
            *arguments(inputs, run), "--nproc-per-node", num_ranks, "--stop-after", steps
        )
        assert done.returncode == 75, done.stderr
    done = train_apart(*arguments(inputs, run), "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    assert "from 1 ranks with ZeRO stage 0 to 2 ranks with stage 3" in done.stderr
    assert_same_learning(run, uninterrupted)


def test_an_interrupted_conversion_is_repeated_by_the_next_start(
    inputs: Inputs, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert train_here(*arguments(inputs, run), "--stop-after", 3).exit_code == 75
    other = arguments(inputs, run, "engine.zero_stage=2")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoint.reshard, "_convert_one_rank", fail)
        interrupted(other)
    assert list((run / "checkpoints").glob(".tmp-universal*"))
    assert train_here(*other).exit_code == 0
    assert not list((run / "checkpoints").glob(".tmp*"))
    assert_same_learning(run, uninterrupted)


def interrupted(call: list[object]) -> Result | None:
    try:
        return train_here(*call)
    except KeyboardInterrupt:
        return None


def test_a_converter_that_fails_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoint" / "engine" / "state").mkdir(parents=True)
    with pytest.raises(
        ArtifactError,
        match=r"could not convert .*; resume with the number of ranks and the stage that wrote it",
    ):
        train.checkpoint.reshard.convert(
            tmp_path / "checkpoint", tmp_path / "out", zero_stage=3, parameters={}
        )
