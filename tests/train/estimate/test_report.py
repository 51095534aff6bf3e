"""Lines for people and JSON for programs are two forms of the same estimate."""

from pathlib import Path

import pytest
from estimates import STATED, planned, write_recipe_8b
from train_runs import train_here


@pytest.fixture(scope="module")
def recipe_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe_8b(tmp_path_factory.mktemp("8b"))


CALLS = {
    "does not fit": ("--gpus", 1),
    "fits barely": ("--gpus", 8, "--max-seq-len", 8192),
    "fits": ("--gpus", 8, "--price", 3),
    "does not run, see below (fits": ("--gpus", 64),
}


@pytest.mark.parametrize("verdict", CALLS)
def test_lines_say_what_the_json_holds(verdict: str, recipe_8b: Path) -> None:
    call = (*STATED, "--recipe", recipe_8b, *CALLS[verdict])
    plan, text = planned(*call), train_here("plan", *call).stdout
    lines = text.splitlines()
    memory, time = plan["memory_gib"], plan["time"]
    head = f"big on {plan['gpus']} x {plan['gpu']}, ZeRO stage {plan['zero_stage']}: {verdict},"
    figures = f"{memory['total']:.1f} of {memory['of']:.1f} GiB per GPU"
    assert lines[0] == f"{head} {figures}{')' * verdict.count('(')}"
    assert plan["verdict"]["fits"] == ("does not fit" not in verdict)
    assert f" at {time['mfu']:.0%} MFU (stated)" in text
    assert f"{time['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU" in text
    assert f"{plan['run']['steps']:,} steps of 16 packs" in text
    for change in plan["changes"]:
        assert any(
            line.startswith(f"  {change['gib']:7.1f} GiB") and change["what"] in line
            for line in lines
        )
    assert [line for line in lines if line.startswith("problem: ")] == [
        f"problem: {problem}" for problem in plan["verdict"]["problems"]
    ]
    assert (f"command: {plan['command']}" in lines) == plan["verdict"]["runs"]


def test_the_parts_of_memory_are_listed_and_none_exceeds_the_peak(recipe_8b: Path) -> None:
    memory = planned(*STATED, "--recipe", recipe_8b, "--gpus", 8)["memory_gib"]
    parts = {key: value for key, value in memory.items() if key not in ("total", "of", "peak_in")}
    assert memory["total"] <= sum(parts.values()) + 1e-9
    assert all(0 <= value <= memory["total"] for value in parts.values())
    assert memory["peak_in"] in ("backward pass", "update", "loss")


def test_a_cost_is_given_for_a_price_only(recipe_8b: Path) -> None:
    call = (*STATED, "--recipe", recipe_8b, "--gpus", 8)
    plan = planned(*call, "--price", 3)
    assert plan["time"]["cost"] == pytest.approx(3 * 8 * plan["time"]["hours"])
    assert planned(*call)["time"]["cost"] is None
    assert "GPU hours" not in train_here("plan", *call).stdout
    text = train_here("plan", *call, "--price", 3).stdout
    hours, cost = plan["time"]["gpu_hours"], plan["time"]["cost"]
    assert f"; {hours:,.0f} GPU hours at 3 each: {cost:,.0f}" in text


def test_a_short_run_is_timed_in_minutes(recipe_8b: Path) -> None:
    call = (*STATED, "--recipe", recipe_8b, "--gpus", 8, "--max-steps", 1)
    minutes = 60 * planned(*call)["time"]["hours"]
    assert f"time     {minutes:.1f} minutes at" in train_here("plan", *call).stdout
