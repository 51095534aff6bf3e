"""A run that is killed with SIGKILL and started again has the losses and weights of an
uninterrupted one."""

import json
import random
from pathlib import Path

import pytest
import torch
from killed_runs import kill_at
from train_runs import losses, records, status, train_apart, train_here, weights, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def timeless(run: Path) -> list[dict[str, object]]:
    """Return the records without times and memory."""
    measured = ("tps", "second", "memory", "mfu")
    return [
        {key: value for key, value in record.items() if not any(word in key for word in measured)}
        for record in records(run)
    ]


def assert_same_run(run: Path, whole: Path) -> None:
    """Losses, learning rates, norms, counters and weights are bit-equal."""
    assert timeless(run) == timeless(whole)
    assert [path.name for path in run.glob("checkpoints/.tmp-*")] == []
    expected, actual = weights(whole), weights(run)
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "landed"),
    [
        ("steps", {"between steps", "inside a checkpoint's write", "between rename and retention"}),
        ("engine", {"inside a checkpoint's write"}),
        ("export", {"inside the export", "after the export"}),
    ],
)
def test_a_killed_run_resumes_exactly(
    phase: str, landed: set[str], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """It is killed between steps, inside the write of a checkpoint, and inside the export."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output")
    assert train_here(*call, whole).exit_code == 0
    assert kill_at(run, phase, random.Random(1), *call, run) in landed
    assert status(run)["state"] == "running"
    assert train_here(*call, run).exit_code == 0
    assert_same_run(run, whole)


MOMENTS = (
    *("start", "steps", "write", "engine", "retire", "steps", "start", "state", "steps", "retire"),
    *(
        "steps",
        "engine",
        "start",
        "write",
        "steps",
        "retire",
        "state",
        "export",
        "export",
        "exported",
    ),
)
PHASES = {
    "start",
    "between steps",
    "inside a checkpoint's write",
    "between rename and retention",
    "inside the export",
    "after the export",
}


@pytest.mark.full
# Several steps pass while a kill takes place.
@pytest.mark.parametrize(("num_ranks", "steps"), [(1, 240), (2, 80)])
def test_twenty_kills_change_nothing(
    num_ranks: int, steps: int, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """One run with dropout, killed twenty times at seeded moments, whole or a single rank."""
    draw = random.Random(num_ranks)
    call = (
        "--shards",
        inputs[0],
        "--recipe",
        inputs[1],
        "--nproc-per-node",
        num_ranks,
        "--max-steps",
        steps,
        "--output",
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_apart(*call, whole).returncode == 0
    landed, wandb_ids = [], set()
    for phase in MOMENTS:
        landed.append(kill_at(run, phase, draw, *call, run))
        wandb_ids.add(json.loads((run / "config.json").read_text())["wandb_id"])
    done = train_apart(*call, run)
    assert done.returncode == 0, done.stderr
    print(
        f"{num_ranks} ranks:", *(f"{landed.count(phase)} {phase}," for phase in sorted(set(landed)))
    )
    assert_same_run(run, whole)
    assert len(wandb_ids) == 1
    assert set(landed) == PHASES


NO_DROPOUT = ("--set", "model.config.attention_dropout=0.0")  # ranks draw from different generators


@pytest.fixture(scope="module")
def two_ranks(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two ranks."""
    run = tmp_path_factory.mktemp("two") / "run"
    call = (
        "--shards",
        inputs[0],
        "--recipe",
        inputs[1],
        "--nproc-per-node",
        2,
        "--output",
        run,
        *NO_DROPOUT,
    )
    done = train_apart(*call)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run / 'model'}\n"
    return run


@pytest.mark.slow
def test_two_killed_ranks_resume_exactly(
    two_ranks: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    call = (
        "--shards",
        inputs[0],
        "--recipe",
        inputs[1],
        "--nproc-per-node",
        2,
        "--output",
        run,
        *NO_DROPOUT,
    )
    assert kill_at(run, "engine", random.Random(0), *call) == "inside a checkpoint's write"
    assert train_apart(*call).returncode == 0
    assert_same_run(run, two_ranks)


@pytest.mark.slow
def test_one_rank_and_two_ranks_log_the_same_losses(
    two_ranks: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "one"
    assert (
        train_here(
            "--shards", inputs[0], "--recipe", inputs[1], "--output", run, *NO_DROPOUT
        ).exit_code
        == 0
    )
    for (step, one), (other, two) in zip(losses(run), losses(two_ranks), strict=True):
        assert step == other
        assert two == pytest.approx(one, rel=1e-5)
