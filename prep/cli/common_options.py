"""What every command of `sft-prep` shares: options for the log, errors that become exit codes."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click


def logging_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the options -v and -q, and run it within `reporting`."""

    @functools.wraps(command)
    def reported(*, verbose: bool, quiet: bool, **options: Any) -> None:
        with reporting(verbose=verbose, quiet=quiet):
            command(**options)

    verbose_option = click.option(
        "-v", "--verbose", is_flag=True, help="Say more, and give tracebacks with errors."
    )
    quiet_option = click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
    return quiet_option(verbose_option(reported))


@contextlib.contextmanager
def reporting(*, verbose: bool = False, quiet: bool = False) -> Iterator[None]:
    """Set up the log; turn the errors of the block into one line and an exit code."""
    from shared import log
    from shared.command import reporting_errors

    verbosity = 1 if verbose else -1 if quiet else 0
    log.configure(verbosity)
    try:
        with reporting_errors(verbosity):
            yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to resume\n")
        raise SystemExit(130) from None
