"""What every command of `sft-train` shares: options become a request, errors become exit codes."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from train.run.prepare import TrainRequest

PATH = click.Path(path_type=Path)


def verbosity_of(given: Mapping[str, Any]) -> int:
    """Return how much the options -v and -q ask for."""
    return -1 if given["quiet"] else int(given["verbose"])


def train_request(given: Mapping[str, Any]) -> "TrainRequest":
    """Return the request that the options of `sft-train` itself make."""
    from train.run.prepare import TrainRequest

    return TrainRequest(
        shards=given["shards"],
        recipe=given["recipe"],
        model=given["model"],
        output=given["output"],
        settings=given["settings"],
        max_steps=given["max_steps"],
        stop_after=given["stop_after"],
        resume=given["resume"],
        eval_shards=given["eval_shards"],
        trust_checkpoint=given["trust_checkpoint"],
        push_to_hub=given["push_to_hub"],
        push_checkpoints=given["push_checkpoints"],
        verbosity=verbosity_of(given),
    )


@contextmanager
def reporting(verbosity: int = 0, *, quiet_stop: bool = False) -> Iterator[None]:
    """`quiet_stop`: a stop on request is left to status.json and our launcher; torchrun would
    report a failure."""
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
