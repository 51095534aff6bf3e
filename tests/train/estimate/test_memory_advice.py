"""Whether a run fits, and advice that comes true when it is followed."""

from pathlib import Path

import pytest
from estimates import STATED, planned, write_recipe_8b
from train_runs import train_here

from train.sizing.memory import GIB


@pytest.fixture(scope="module")
def recipe_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe_8b(tmp_path_factory.mktemp("8b"))


def test_more_gpus_make_a_run_fit(recipe_8b: Path) -> None:
    one, eight = (planned(*STATED, "--recipe", recipe_8b, "--gpus", gpus) for gpus in (1, 8))
    assert not one["verdict"]["fits"]
    assert eight["verdict"]["fits"]
    assert eight["memory_gib"]["total"] < one["memory_gib"]["total"]
    more = [change for change in one["changes"] if "--gpus" in change["what"]]
    assert all(change["fits"] for change in more)
    assert more


@pytest.mark.parametrize("num_gpus", [1, 8])
def test_the_number_of_gpus_that_is_advised_is_the_smallest_doubling_that_fits(
    num_gpus: int, recipe_8b: Path
) -> None:
    call = (*STATED, "--recipe", recipe_8b, "--gpu", "L40S", "--gpus")
    changes = planned(*call, num_gpus)["changes"]
    unchanged = next(change for change in changes if change["what"].startswith("--gpus"))
    words = unchanged["what"].split()
    gpus = int(words[1])
    assert "with the changes above" not in unchanged["what"]
    after, before = planned(*call, gpus), planned(*call, gpus // 2)
    assert (before["verdict"]["fits"], after["verdict"]["fits"]) == (False, True)
    assert after["memory_gib"]["total"] == pytest.approx(unchanged["gib"])


@pytest.mark.parametrize("gpus", [2, 4])
def test_advice_that_is_followed_comes_true(recipe_8b: Path, gpus: int) -> None:
    call = (*STATED, "--recipe", recipe_8b, "--gpu", "L40S")
    plan = planned(*call, "--gpus", gpus)
    assert not plan["verdict"]["fits"]
    what = "model.gradient_checkpointing=true"
    (change,) = (change for change in plan["changes"] if change["what"] == what)
    after = planned(*call, "--gpus", gpus, "--set", change["what"])
    assert after["memory_gib"]["total"] == pytest.approx(change["gib"])
    assert after["verdict"]["fits"] == change["fits"]


def test_offload_is_advised_with_what_the_host_needs(recipe_8b: Path) -> None:
    plan = planned(*STATED, "--recipe", recipe_8b, "--gpus", 2)
    (change,) = (change for change in plan["changes"] if "offload_optimizer=cpu" in change["what"])
    assert change["host_gib"] == pytest.approx(16 * plan["model"]["parameters"] / 2 / GIB)
    assert all(change["gib"] < plan["memory_gib"]["total"] for change in plan["changes"])
    text = train_here("plan", *STATED, "--recipe", recipe_8b, "--gpus", 2).stdout
    assert "GiB of the host for each GPU" in text
