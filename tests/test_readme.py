"""The README's commands do what it says: its walk-through is run, its recipe is loaded, its targets
exist."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from repository import ROOT

from prep.config import MixtureConfig
from shared import config
from shared.shard_format import COLUMNS
from train.config import TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_walk_through_runs_as_written(tmp_path: Path) -> None:
    (script,) = (block for block in blocks("sh") if "mixture.toml" in block)
    (tmp_path / "prep").symlink_to(ROOT / "prep")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/walk/model/model.safetensors").is_file()
    assert (tmp_path / "runs/walk/loss.png").is_file()
    assert "What is 2 + 3?" in done.stdout


def test_the_recipe_shown_is_a_recipe() -> None:
    (text,) = (block for block in blocks("toml") if "[optim]" in block)
    assert config.build(TrainConfig, tomllib.loads(text), "README.md").model.name


def test_the_part_of_a_mixture_shown_is_one() -> None:
    (text,) = (block for block in blocks("toml") if "[[sources]]" in block)
    rest = {
        "name": "x",
        "max_seq_len": 64,
        "tokenizer": {"name": "x"},
        "template": {"name": "tulu"},
    }
    assert config.build(MixtureConfig, {**rest, **tomllib.loads(text)}, "README.md").sources


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z]+)", README))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_format_shown_names_every_column() -> None:
    for name in COLUMNS:
        assert f"{name}.npy" in README
