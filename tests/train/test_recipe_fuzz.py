"""Any value of any key of a recipe gives a run or one line with an exit code of ours, never a
traceback."""

import dataclasses
import math
import random
import typing
from pathlib import Path
from typing import Any

import pytest
from train_runs import train_here, write_inputs

from shared import config as shared_config
from shared.errors import ConfigError
from train.config import TrainConfig

BASE: dict[str, Any] = {
    "name": "x",
    "optim": {"learning_rate": 1e-3},
    "batch": {"packs_per_step": 4},
}
VALUES: tuple[Any, ...] = (
    *(
        math.nan,
        math.inf,
        -math.inf,
        -1,
        0,
        1,
        -1.0,
        0.0,
        0.5,
        1e-320,
        1e308,
        10**400,
        -(10**400),
        2**31,
        2**63,
        2**64,
    ),
    *(
        "",
        " ",
        "\0",
        "none",
        "auto",
        "nvme",
        "../x",
        "x" * 5000,
        True,
        False,
        [],
        {},
        [""],
        [1, "a"],
        {"a": {}},
    ),
)


def keys(cls: Any = TrainConfig, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(cls)
    names = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            names += keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


@pytest.mark.parametrize("key", keys())
def test_any_value_of_a_key_is_accepted_or_refused_by_name(key: str) -> None:
    section, _, name = key.rpartition(".")
    for value in VALUES:
        tables = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
        (tables.setdefault(section, {}) if section else tables)[name] = value
        if section == "batch" and name in ("tokens_per_step", "conversations_per_step"):
            del tables["batch"]["packs_per_step"]
        refusal = ""
        try:
            shared_config.build(TrainConfig, tables, "recipe")
        except ConfigError as exc:
            refusal = str(exc)
        assert not refusal or name in refusal or section in refusal, value
        assert len(refusal) < 1000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.eps=-1", "eps = -1.0; expected more than 0"),
        ("optim.eps=0", "eps = 0.0; expected more than 0"),
        ("model.mlp_tiles=1000", "mlp_tiles = 1000; expected 1 or more, at most 64"),
        ("log.wandb_project=''", "wandb_project = ''"),
        ("schedule.epochs=1e300", "epochs = 1e+300"),
        ("lora.targets=['']", "targets = ['']"),
        ("name=''", "name = ''"),
        ("model.config.hidden_act=inf", "expected finite numbers, text, lists and tables only"),
        (
            "model.config.rope_parameters={rope_theta=nan}",
            "expected finite numbers, text, lists and tables only",
        ),
        (
            "model.config.hidden_act=2026-01-01",
            "expected finite numbers, text, lists and tables only",
        ),
    ],
)
def test_absurd_values_are_refused(setting: str, message: str, tmp_path: Path) -> None:
    shards, recipe = write_inputs(tmp_path)
    done = train_here(
        "--shards", shards, "--recipe", recipe, "--set", setting, "--output", tmp_path / "run"
    )
    assert done.exit_code == 3
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_seeded_sample_runs_or_ends_with_one_line(tmp_path: Path) -> None:
    shards, recipe = write_inputs(tmp_path)
    draw = random.Random(4)
    chosen = [key for key in keys() if key.partition(".")[0] not in ("name", "lora")]
    for number in range(12):
        key, value = (
            draw.choice(chosen),
            draw.choice(["-1", "0", "1", "2", "3", "0.5", "1e30", "nan", "x", "''", "true"]),
        )
        run = tmp_path / str(number)
        done = train_here(
            "--shards",
            shards,
            "--recipe",
            recipe,
            "--output",
            run,
            "--max-steps",
            1,
            "--set",
            f"{key}={value}",
        )
        assert done.exit_code in (0, 3, 4, 5, 6), (key, value, done.output)
        assert "Traceback" not in done.output
        assert done.exit_code == 0 or "error: " in done.stderr, (key, value)


@pytest.mark.parametrize("kind", ["file", "below", "foreign"])
def test_an_impossible_output_is_refused_and_nothing_is_touched(kind: str, tmp_path: Path) -> None:
    shards, recipe = write_inputs(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    output = tmp_path / {"file": "file", "below": "file/run", "foreign": "foreign"}[kind]
    done = train_here("--shards", shards, "--recipe", recipe, "--output", output)
    assert done.exit_code == 5
    assert f"--output {output}" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--max-steps", 0), 2),
        (("--max-steps", -1), 2),
        (("--stop-after", 0), 2),
        (("--nproc-per-node", 0), 2),
        (("--nproc-per-node", 1000), 3),
        (("--resume", ""), 5),
        (("--resume", "nonsense"), 5),
        (("--set", ""), 3),
        (("--set", "="), 3),
        (("--set", "optim"), 3),
        (("--set", "optim.learning_rate.x=1"), 3),
        (("--set", "a.b=1"), 3),
    ],
)
def test_nonsense_on_the_command_line_ends_with_one_line(
    arguments: tuple[Any, ...], code: int, tmp_path: Path
) -> None:
    shards, recipe = write_inputs(tmp_path)
    settings = ("--set", "batch={conversations_per_step=1000}")
    done = train_here(
        "--shards", shards, "--recipe", recipe, "--output", tmp_path / "run", *settings, *arguments
    )
    assert done.exit_code == code, done.output
