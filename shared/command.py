"""What the two commands share: an error that a user can act on becomes one line on stderr and an
exit code."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from shared.disk import unwritable
from shared.errors import SftError, StoppedOnRequest


@contextlib.contextmanager
def reporting_errors(verbosity: int = 0, *, rank: int = 0) -> Iterator[None]:
    """Turn an SftError of the block into one line and SystemExit; the traceback comes with
    verbosity above 0.

    So it does with an OSError for lack of space or permission. Anything else is a bug and keeps its
    traceback. Ranks above 0 put their number in front.
    """
    try:
        yield
    except SftError as exc:
        _end(exc, verbosity, rank)
    except OSError as exc:
        error = unwritable(exc)
        if error is None:
            raise
        _end(error, verbosity, rank)


def _end(error: SftError, verbosity: int, rank: int) -> NoReturn:
    if verbosity > 0:
        traceback.print_exc()
    message = " ".join(str(error).split())
    where = f"rank {rank}: " if rank else ""
    if not isinstance(error, StoppedOnRequest):
        sys.stderr.write(f"{where}error: {message}\n")
    elif not rank:
        sys.stderr.write(f"{message}\n")
    raise SystemExit(error.exit_code) from error
