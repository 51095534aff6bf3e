"""A request survives its command line, whatever its values; the program beside this Python is
the one that is started."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.errors import PrerequisiteError
from train.cli.main import cli
from train.run.command_line import console_script, rank_arguments, request_arguments
from train.run.prepare import TrainRequest

VALUES: dict[str, list[Any]] = {
    "recipe": ["tulu3-8b", "a recipe.toml", "-x.toml"],
    "model": ["some/model", "--strange"],
    "output": [Path("runs/y"), Path("a run")],
    "settings": [("optim.learning_rate=1e-5", "log.wandb=offline"), ("log.wandb_name=--a=b c",)],
    "max_steps": [1, 7],
    "stop_after": [3],
    "resume": ["never", "runs/y/checkpoints/step-00000002"],
    "eval_shards": [Path("held-out")],
    "trust_checkpoint": [True],
    "push_to_hub": ["user/model"],
    "push_checkpoints": ["user/checkpoints"],
    "verbosity": [-1, 1, 2],
}


def made_up_request(seed: int) -> TrainRequest:
    draw = random.Random(seed)
    chosen = {name: draw.choice(values) for name, values in VALUES.items() if draw.random() < 0.5}
    return TrainRequest(shards=Path("data_cache/x"), **chosen)


@pytest.mark.parametrize("seed", range(40))
def test_a_rank_parses_the_request_that_the_launcher_had(seed: int) -> None:
    request = made_up_request(seed)
    parameters = dict(cli.make_context("sft-train", rank_arguments(request)).params)
    assert parameters.pop("under_launcher") is True
    assert parameters.pop("nproc_per_node") is None
    quiet, verbose = parameters.pop("quiet"), parameters.pop("verbose")
    assert TrainRequest(**parameters, verbosity=-1 if quiet else verbose) == request


def test_the_values_cover_every_field_of_a_request() -> None:
    assert {"shards", *VALUES} == set(TrainRequest.__dataclass_fields__)


def test_defaults_take_no_words() -> None:
    assert request_arguments(TrainRequest(shards=Path("s"))) == ["--shards", "s"]


def test_the_program_beside_this_python_comes_before_the_one_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("venv", "path"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sft-train").write_text("#!/bin/sh\n")
        (tmp_path / folder / "sft-train").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert console_script() == tmp_path / "venv" / "sft-train"
    (tmp_path / "venv" / "sft-train").unlink()
    assert console_script() == tmp_path / "path" / "sft-train"
    (tmp_path / "path" / "sft-train").unlink()
    with pytest.raises(PrerequisiteError, match="no command sft-train"):
        console_script()
