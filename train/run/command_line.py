"""A request to train as a command line, to start the ranks with; and the program to start."""

import dataclasses
import shutil
import sys
from pathlib import Path

from shared.errors import PrerequisiteError
from train.run.prepare import TrainRequest


def rank_arguments(request: TrainRequest) -> list[str]:
    """Return the command line of a rank: that of `request`."""
    return ["--under-launcher", *request_arguments(request)]


def request_arguments(request: TrainRequest) -> list[str]:
    """Return the command line that makes `request`: the options of the fields that differ from
    their defaults."""
    arguments: list[str] = []
    for field in dataclasses.fields(request):
        value, option = getattr(request, field.name), f"--{field.name.replace('_', '-')}"
        if field.name == "verbosity":
            arguments += ["-v"] * value or ["-q"] * -value
        elif field.name == "settings":
            for setting in value:
                arguments += ["--set", setting]
        elif value is True:
            arguments.append(option)
        elif value != field.default:
            arguments += [option, str(value)]
    return arguments


def console_script() -> Path:
    """Return the sft-train beside this Python. Raises PrerequisiteError if there is none."""
    beside = Path(sys.executable).with_name("sft-train")
    path = beside if beside.exists() else shutil.which("sft-train")
    if path is None:
        raise PrerequisiteError(
            "no command sft-train to start processes with; install this package with pip"
        )
    return Path(path)
