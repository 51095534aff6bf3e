"""How both commands end with an error: one that a user can act on becomes one line on stderr and an
exit code."""

import contextlib
import sys
import traceback
from collections.abc import Iterator

from shared.disk import unwritable
from shared.errors import SftError, StoppedOnRequest


@contextlib.contextmanager
def reporting_errors(verbosity: int = 0, *, rank: int = 0) -> Iterator[None]:
    """Turn an SftError of the block, or an OSError for lack of space or permission, into one line
    and SystemExit.

    With verbosity above 0 the traceback is printed as well. Anything else is a bug and keeps its
    traceback. Ranks above 0 put their number in front.
    """
    try:
        yield
    except (SftError, OSError) as exc:
        error = unwritable(exc) if isinstance(exc, OSError) else exc
        if error is None:
            raise
        if verbosity > 0:
            traceback.print_exc()
        message = " ".join(str(error).split())
        if not isinstance(error, StoppedOnRequest):
            sys.stderr.write(f"{f'rank {rank}: ' if rank else ''}error: {message}\n")
        elif not rank:
            sys.stderr.write(f"{message}\n")
        raise SystemExit(error.exit_code) from error
