"""What every command of `sft-train` shares: options become requests, errors become exit codes."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from train.run.prepare import TrainRequest

PATH = click.Path(path_type=Path)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the options --recipe, --model and --set."""
    for option in (
        click.option(
            "--set",
            "settings",
            metavar="KEY=VALUE",
            multiple=True,
            help="Change a key of the recipe.",
        ),
        click.option(
            "--model", metavar="NAME|DIR", help="Hugging Face causal LM; default: the recipe's."
        ),
        click.option(
            "--recipe",
            metavar="NAME|FILE",
            help="How to train; default: what the shard set names.",
        ),
    ):
        command = option(command)
    return command


def verbosity_of(options: Mapping[str, Any]) -> int:
    """Return the verbosity that -v and -q ask for."""
    return -1 if options["quiet"] else int(options["verbose"])


def fields_from(cls: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `options` that are fields of the dataclass `cls`: an option has the name of
    its field, so that neither is listed twice."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: options[name] for name in names if name in options}


def train_request(options: Mapping[str, Any]) -> "TrainRequest":
    """Return the request that the options of `sft-train` itself make."""
    from train.run.prepare import TrainRequest

    return TrainRequest(**fields_from(TrainRequest, options), verbosity=verbosity_of(options))


@contextmanager
def reporting(verbosity: int = 0, *, quiet_stop: bool = False) -> Iterator[None]:
    """Set up the log; turn the errors of the block into one line and an exit code.

    With `quiet_stop` a stop on request ends the block without an error: status.json reports it to
    our launcher, while torchrun would report a failure.
    """
    from shared import log
    from shared.command import reporting_errors
    from shared.errors import StoppedOnRequest
    from train.engine.launcher_env import launched, read_launcher_env

    rank = read_launcher_env().rank
    log.configure(verbosity, rank=rank if launched() else None)
    with reporting_errors(verbosity, rank=rank):
        try:
            yield
        except StoppedOnRequest:
            if not quiet_stop:
                raise
        except KeyboardInterrupt:
            sys.stderr.write("stopped by Ctrl-C\n")
            raise SystemExit(130) from None
