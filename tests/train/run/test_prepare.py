"""What is decided before torch is imported: which checkpoint to resume, which ranks can run."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import RECIPE, train_here, write_inputs

from shared import config
from shared.errors import ArtifactError, ConfigError
from train.config import TrainConfig
from train.run.directory import RunDir
from train.run.prepare import (
    Prepared,
    TrainRequest,
    check_division,
    decide_again,
    needs_resharding,
    prepare,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def stopped(inputs: tuple[Path, Path], tmp_path: Path) -> TrainRequest:
    """The request of a run that was stopped after step 4, with checkpoints of steps 2 and 4."""
    request = TrainRequest(shards=inputs[0], recipe=str(inputs[1]), output=tmp_path / "run")
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--output", tmp_path / "run")
    assert train_here(*call, "--stop-after", 4).exit_code == 75
    return request


def test_no_torch_is_needed(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from train.run.prepare import TrainRequest, prepare\n"
        "shards, recipe, output = sys.argv[1:]\n"
        "prepare(TrainRequest(shards=Path(shards), recipe=recipe, output=Path(output)))\n"
        "print('torch' in sys.modules)"
    )
    words = [sys.executable, "-P", "-c", code, *map(str, inputs), str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_last_checkpoint_is_resumed_from_unless_another_is_named(stopped: TrainRequest) -> None:
    prepared = prepare(stopped)
    checkpoints = prepared.run.checkpoints
    assert prepared.resume_from == checkpoints / "step-00000004"
    named = dataclasses.replace(stopped, resume=str(checkpoints / "step-00000002"))
    assert prepare(named).resume_from == checkpoints / "step-00000002"
    with pytest.raises(ArtifactError, match="holds a run already"):
        prepare(dataclasses.replace(stopped, resume="never"))
    with pytest.raises(ArtifactError, match="there is no such checkpoint"):
        prepare(dataclasses.replace(stopped, resume=str(checkpoints / "step-00000003")))


def test_the_decision_is_made_again_for_what_another_start_has_changed(
    stopped: TrainRequest,
) -> None:
    prepared = prepare(stopped)
    (prepared.run.checkpoints / "step-00000004").rename(prepared.run.checkpoints / "gone")
    assert decide_again(prepared).resume_from == prepared.run.checkpoints / "step-00000002"
    description = json.loads(prepared.run.config.read_text())
    description["identity"]["total_steps"] = 9
    prepared.run.config.write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="was begun with total_steps = 9, now it is 8"):
        decide_again(prepared)


def test_checkpoints_that_were_put_there_need_trust_and_bind_as_a_run_does(
    stopped: TrainRequest,
) -> None:
    assert stopped.output is not None
    RunDir(stopped.output).config.unlink()
    with pytest.raises(ArtifactError, match="they were not written there"):
        prepare(stopped)
    trusted = dataclasses.replace(stopped, trust_checkpoint=True)
    resume_from = prepare(trusted).resume_from
    assert resume_from is not None
    assert resume_from.name == "step-00000004"
    with pytest.raises(ConfigError, match=r"was begun with run\.seed = 0, now it is 1"):
        prepare(dataclasses.replace(trusted, settings=("run.seed=1",)))


@pytest.mark.parametrize(
    ("world_size", "zero_stage", "reshards"),
    [(1, "auto", False), (2, "auto", True), (1, "1", True)],
)
def test_other_ranks_or_another_zero_stage_need_resharding(
    world_size: int, zero_stage: str, reshards: bool, stopped: TrainRequest
) -> None:
    settings = (f"engine.zero_stage={zero_stage}",)
    prepared = prepare(dataclasses.replace(stopped, settings=settings))
    assert needs_resharding(prepared, world_size) == reshards
    start = dataclasses.replace(prepared, resume_from=None)
    assert not needs_resharding(start, world_size)


@pytest.fixture(scope="module")
def prepared(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    output = tmp_path_factory.mktemp("runs") / "run"
    return prepare(TrainRequest(shards=inputs[0], recipe=str(inputs[1]), output=output))


@pytest.mark.parametrize("shared_by", [1, 2])
@pytest.mark.parametrize("per_micro_batch", [1, 2, 3])
def test_ranks_can_run_steps_of_packs_exactly_if_they_divide(
    per_micro_batch: int, shared_by: int, prepared: Prepared
) -> None:
    recipe = config.build(
        TrainConfig,
        {
            **config.to_plain(prepared.recipe),
            "batch": {"packs_per_step": 12, "packs_per_micro_batch": per_micro_batch},
            "engine": {"sequence_parallel": shared_by},
        },
        "test",
    )
    order = dataclasses.replace(prepared.order, units_per_step=12)
    for world_size in range(1, 15):
        num_groups = world_size // shared_by
        if world_size % shared_by == 0 and 12 % (num_groups * per_micro_batch) == 0:
            check_division(recipe, order, world_size)
        else:
            with pytest.raises(ConfigError, match="divide"):
                check_division(recipe, order, world_size)


def test_conversations_divide_over_any_number_of_ranks(tmp_path: Path) -> None:
    recipe = RECIPE.replace("packs_per_step = 4", "conversations_per_step = 7")
    shards, path = write_inputs(tmp_path, recipe=recipe)
    prepared = prepare(TrainRequest(shards=shards, recipe=str(path), output=tmp_path / "run"))
    for world_size in range(1, 9):
        check_division(prepared.recipe, prepared.order, world_size)
