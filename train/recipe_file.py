"""Read recipe files, shipped ones and those of users, and apply the changes of the command line.

A model directory is relative to the recipe that names it, or to the working directory if it comes
from the command line.
"""

from pathlib import Path
from typing import Any

from shared import config
from shared.errors import ConfigError
from train.config import TrainConfig


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that the package ships: name -> file."""
    return config.shipped_files("train", "recipes", ".toml")


def load_recipe(
    recipe: str,
    settings: tuple[str, ...] = (),
    *,
    model: str | None = None,
    max_steps: int | None = None,
) -> TrainConfig:
    """Return the recipe called `recipe` (a shipped one or a .toml file) with the changes of the
    command line.

    A `model.name` that is a directory becomes an absolute path. Raises ConfigError for an unknown
    name, key or value.
    """
    path = config.shipped_or_file(recipe, shipped_recipes(), "recipe")
    tables: dict[str, Any] = config.apply_settings(config.load_toml(path), settings)
    model_dir = path.resolve().parent
    if model is not None:
        tables["model"] = {**tables.get("model", {}), "name": model}
        # A model given by name replaces one with random weights.
        tables["model"].pop("config", None)
        model_dir = Path.cwd()
    if max_steps is not None:
        tables["schedule"] = {**tables.get("schedule", {}), "max_steps": max_steps}
    # Values of a wrong type are left for `config.build` to report.
    section = tables.get("model")
    name = section.get("name") if isinstance(section, dict) else None
    if isinstance(section, dict) and isinstance(name, str) and name:
        folder = model_dir / Path(name).expanduser()
        if folder.is_dir():
            section["name"] = str(folder.resolve())
        elif name.startswith(("/", "./", "../", "~")):
            raise ConfigError(
                f"model.name = {name!r}: there is no directory {folder}; give one that exists, or"
                " the id of a hub model"
            )
    return config.build(TrainConfig, tables, f"{path} with --set" if settings else str(path))
