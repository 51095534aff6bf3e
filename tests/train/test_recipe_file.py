"""Recipe files: shipped or given by path, changed by the command line, with directories beside
them."""

from pathlib import Path

import pytest

from shared.errors import ConfigError
from train.recipe_file import load_recipe, shipped_recipes

RECIPE = """
name = "r"
[model]
name = "MODEL"
[optim]
learning_rate = 1
[batch]
packs_per_step = 1
"""


def write(folder: Path, model: str) -> str:
    folder.mkdir(exist_ok=True)
    file = folder / "r.toml"
    file.write_text(RECIPE.replace("MODEL", model))
    return str(file)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_has_the_name_of_its_file(name: str) -> None:
    assert load_recipe(name).name == name


def test_the_command_line_overrides_the_file() -> None:
    recipe = load_recipe(
        "tiny", ("optim.learning_rate=1", "loss.norm=sum"), model="some/model", max_steps=7
    )
    assert recipe.optim.learning_rate == 1.0
    assert recipe.loss.norm == "sum"
    assert recipe.schedule.max_steps == 7
    assert recipe.model.name == "some/model"
    assert recipe.model.config is None


@pytest.mark.parametrize("model", ["mine", "./mine", "../recipes/mine"])
def test_a_model_directory_is_relative_to_the_recipe(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "recipes", model)
    (tmp_path / "recipes" / "mine").mkdir()
    monkeypatch.chdir("/")
    assert load_recipe(file).model.name == str(tmp_path / "recipes" / "mine")
    assert load_recipe(file, model="org/name").model.name == "org/name"


def test_a_model_directory_on_the_command_line_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "recipes", "org/name")
    for folder in (tmp_path / "mine", tmp_path / "recipes" / "mine"):
        folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe(file, model="mine").model.name == str(tmp_path / "mine")


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = load_recipe(write(tmp_path / "recipes", "~/mine"))
    assert recipe.model.name == str(tmp_path / "home" / "mine")


@pytest.mark.parametrize("model", ["./mine", "../mine", "/no/such/mine", "~/no-such-mine"])
def test_a_path_that_is_no_directory_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no directory .*mine; give one that exists"):
        load_recipe(write(tmp_path, model))


def test_an_unknown_recipe_lists_those_that_ship() -> None:
    with pytest.raises(ConfigError, match=r"no recipe named 'tinny'; shipped: .*tiny"):
        load_recipe("tinny")
