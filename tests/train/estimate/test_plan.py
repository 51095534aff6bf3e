"""`sft-train plan`: problems are named with what would work, and its command starts the run."""

import re
import shlex
from pathlib import Path

import pytest
from estimates import STATED, planned, write_recipe_8b
from repository import ROOT
from train_runs import train_here, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def recipe_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe_8b(tmp_path_factory.mktemp("8b"))


def test_if_the_batch_does_not_divide_the_sizes_that_do_are_listed(recipe_8b: Path) -> None:
    result = train_here("plan", *STATED, "--recipe", recipe_8b, "--gpus", 64)
    assert result.exit_code == 0
    assert "does not run" in result.stdout.splitlines()[0]
    assert "16 packs per step do not divide over 64 ranks" in result.stdout
    assert "use 64 packs per step, or 1, 2, 4, 8, 16 ranks" in result.stdout
    assert "command:" not in result.stdout
    batch = "batch={conversations_per_step=134}"
    assert f"--set '{batch}'" in result.stdout
    plan = planned(*STATED, "--recipe", recipe_8b, "--gpus", 64, "--set", batch)
    assert plan["verdict"]["runs"]
    # Two conversations per rank are never equally long.
    assert plan["run"]["waiting"] > 1.5


def test_the_command_starts_the_run_on_those_gpus(recipe_8b: Path) -> None:
    many, few = (
        planned(*STATED, "--recipe", recipe_8b, "--gpus", gpus)["command"] for gpus in (16, 4)
    )
    assert many.startswith("sft-train launch --nodes 2 --gpus-per-node 8 --slurm")
    assert few.endswith("--nproc-per-node 4")


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("Give --shards, or all of", ()),
        ("Give --shards, or all of", ("--rows", 3)),
        ("--gpu V1: not known; known are H100 PCIe", (*STATED, "--gpu", "V1")),
        ("--gpus 12 do not fill whole nodes", (*STATED, "--gpus", 12)),
        ("--mfu 1.5; expected", (*STATED, "--mfu", 1.5)),
        ("expected from 1 to --tokens 5", ("--rows", 1, "--tokens", 5, "--loss-tokens", 6)),
    ],
)
def test_what_cannot_be_planned_is_refused(
    recipe_8b: Path, message: str, arguments: tuple[object, ...]
) -> None:
    result = train_here("plan", *arguments, "--recipe", recipe_8b)
    assert result.exit_code in (2, 3)
    assert message in result.stderr


def test_a_model_table_without_vocabulary_needs_a_shard_set(inputs: tuple[Path, Path]) -> None:
    result = train_here("plan", *STATED, "--recipe", inputs[1], "--max-seq-len", 32)
    assert result.exit_code == 3
    assert "no vocab_size" in result.stderr


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_a_shipped_recipe_with_a_model_table_can_be_planned(
    inputs: tuple[Path, Path], name: str
) -> None:
    assert planned("--shards", inputs[0], "--recipe", name, "--gpus", 1)["verdict"]["fits"]


def test_the_commands_on_the_page_are_taken(recipe_8b: Path, inputs: tuple[Path, Path]) -> None:
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    of_shards, of_sizes = re.findall(r"^sft-train plan (.*)$", page, re.MULTILINE)[-2:]
    model = ("--model", recipe_8b.parent / "model")
    plan = planned(*shlex.split(of_sizes), *model)
    assert plan["recipe"] == "tulu3-8b-released"
    assert (plan["gpus"], plan["verdict"]["runs"]) == (64, True)
    words = [
        str(inputs[0]) if word.startswith("data_cache/") else word
        for word in shlex.split(of_shards)
    ]
    assert planned(*words, "--recipe", "tiny")["time"]["cost"] > 0


def test_offload_on_one_rank_is_a_problem_and_not_a_crash(recipe_8b: Path) -> None:
    call = (*STATED, "--recipe", recipe_8b, "--gpus", 1, "--set", "engine.offload_optimizer=cpu")
    assert "needs ZeRO" in planned(*call)["verdict"]["problems"][0]
    stage = planned(*call, "--set", "engine.zero_stage=3")
    assert stage["verdict"]["runs"]
    assert stage["memory_gib"]["optimizer"] == stage["memory_gib"]["gradients"] == 0
