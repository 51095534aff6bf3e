"""A request to train as a command line: what starts the ranks, and what starts a push."""

import shutil
import sys
from pathlib import Path

from shared.errors import PrerequisiteError
from train.run.prepare import TrainRequest


def rank_arguments(request: TrainRequest) -> list[str]:
    """Return the command line of a rank: that of `request`."""
    return ["--under-launcher", *request_arguments(request)]


def request_arguments(request: TrainRequest) -> list[str]:
    """Return the command line that makes `request`."""
    arguments = ["--shards", str(request.shards)]
    for name, value in (
        ("--recipe", request.recipe),
        ("--model", request.model),
        ("--output", request.output),
        ("--eval-shards", request.eval_shards),
        ("--max-steps", request.max_steps),
        ("--stop-after", request.stop_after),
        ("--push-to-hub", request.push_to_hub),
        ("--push-checkpoints", request.push_checkpoints),
        ("--resume", request.resume if request.resume != "auto" else None),
    ):
        if value is not None:
            arguments += [name, str(value)]
    if request.trust_checkpoint:
        arguments.append("--trust-checkpoint")
    for setting in request.settings:
        arguments += ["--set", setting]
    return arguments + ["-v"] * max(0, request.verbosity) + ["-q"] * max(0, -request.verbosity)


def console_script() -> Path:
    """Return the sft-train beside this Python. Raises PrerequisiteError if there is none."""
    beside = Path(sys.executable).with_name("sft-train")
    found = beside if beside.exists() else shutil.which("sft-train")
    if found is None:
        raise PrerequisiteError(
            "no command sft-train to start the ranks with; install this package with pip"
        )
    return Path(found)
