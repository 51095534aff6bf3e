"""The run directory: where a run may lie, what binds a resume, and files that are damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from train_runs import write_inputs

from shared.errors import ArtifactError, ConfigError, FingerprintMismatchError
from train.run.directory import (
    RunDir,
    check_identity,
    check_output,
    read_description,
    read_status,
    write_status,
)
from train.run.prepare import Prepared, TrainRequest, prepare


def files(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        for name in names:
            (folder / name).touch()

    return make


@pytest.mark.parametrize(
    "make",
    [
        lambda _folder: None,
        files(),
        files("slurm-4711.out", "job.sh", "train.log", "job.err", ".gitignore"),
        files(".lock", "config.json", "notes.txt"),
        files("STOP", "notes.txt"),
        lambda folder: (folder / "logs").mkdir(parents=True),
    ],
    ids=["free name", "empty", "what starts a run", "a run with a note", "a STOP", "logs"],
)
def test_a_run_may_lie_in_a_directory_that_is_free_or_a_run_s(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / "run")
    check_output(RunDir(tmp_path / "run"))


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (files("thesis.tex"), "run", r"holds thesis\.tex and no run; expected an empty directory"),
        (files("b", "a"), "run", "holds a and no run"),
        (files("a"), "run/a", r"run/a is a file; expected a directory"),
        (files("a"), "run/a/b/c", r"run/a is a file; expected a directory"),
        (files(), "run/" + "x" * 300, "name another directory"),
    ],
)
def test_a_run_may_not_lie_in_or_under_anything_else(
    make: Callable[[Path], None], name: str, message: str, tmp_path: Path
) -> None:
    make(tmp_path / "run")
    with pytest.raises(ArtifactError, match=message):
        check_output(RunDir(tmp_path / name))


@pytest.fixture(scope="module")
def prepared_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    folder = tmp_path_factory.mktemp("inputs")
    shards, recipe = write_inputs(folder)

    def prepare_with(*settings: str) -> Prepared:
        output = folder / "run"
        return prepare(
            TrainRequest(shards=shards, recipe=str(recipe), output=output, settings=settings)
        )

    return prepare_with


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("optim.learning_rate=1e-4", "optim.learning_rate = 0.003"),
        ("optim.max_grad_norm=0.5", "optim.max_grad_norm = 1.0"),
        ("schedule.kind=linear", 'schedule.kind = "cosine"'),
        ("schedule.epochs=4", "schedule.epochs = 3.0"),
        ("batch={packs_per_step=2}", "packs_per_step = 4"),
        ("batch={conversations_per_step=4}", "conversations_per_step = null"),
        ("loss.norm=sample", 'loss.norm = "token"'),
        ("run.seed=1", "run.seed = 0"),
        ("engine.dtype=bf16", 'engine.dtype = "auto"'),
        ("model.config.hidden_size=64", "model.config.hidden_size = 32"),
    ],
)
def test_what_the_weights_depend_on_may_not_change(
    setting: str, key: str, prepared_with: Callable[..., Prepared]
) -> None:
    old, new = prepared_with().identity, prepared_with(setting).identity
    with pytest.raises(ConfigError, match=f"RUN was begun with {key}, now it is"):
        check_identity(old, new, Path("RUN"))


@pytest.mark.parametrize(
    "setting",
    [
        "log.every_steps=3",
        "checkpoint.every_steps=1",
        "eval.every_steps=1",
        "batch.packs_per_micro_batch=2",
        "model.gradient_checkpointing=true",
        "model.attention=per_sequence",
        "engine.zero_stage=2",
        "run.on_non_finite=skip",
        "run.hang_timeout_minutes=1",
    ],
)
def test_what_changes_speed_and_memory_only_may_change(
    setting: str, prepared_with: Callable[..., Prepared]
) -> None:
    check_identity(prepared_with().identity, prepared_with(setting).identity, Path("RUN"))


def test_other_shards_are_told_from_another_recipe(prepared_with: Callable[..., Prepared]) -> None:
    old = prepared_with().identity
    with pytest.raises(FingerprintMismatchError, match="name the shards of the run"):
        check_identity(old, {**old, "shards": "0" * 64, "total_steps": 1}, Path("RUN"))


def test_a_status_is_read_back_and_a_missing_one_is_none(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_status(run) is None
    write_status(run, "stopped", exit_code=75, message="stopped after step 3")
    expected = {"state": "stopped", "exit_code": 75, "message": "stopped after step 3"}
    assert read_status(run) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[1]", "holds no JSON object"),
        (json.dumps({"identity": {}}), "does not describe a run"),
        (json.dumps({"identity": [], "wandb_id": "x"}), "does not describe a run"),
    ],
)
def test_a_damaged_description_is_refused(content: str, message: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_description(run) is None
    run.config.write_text(content)
    with pytest.raises(ArtifactError, match=message):
        read_description(run)
