"""What a user can act on when a place cannot be written: an error with the place and the remedy,
not a traceback."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.errors import PrerequisiteError, SftError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "make it writable",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
}


@contextlib.contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Turn an OSError that says no space or no permission into a PrerequisiteError that names
    `place`, or the file."""
    try:
        yield
    except OSError as exc:
        error = unwritable(exc, place)
        if error is None:
            raise
        raise error from exc


@contextlib.contextmanager
def library_writing_to(place: Path) -> Iterator[None]:
    """Do as `writing_to`, also where a library says in words of its own that it could not write:
    the disk is asked."""
    try:
        with writing_to(place):
            yield
    except SftError:
        raise
    except Exception:
        with writing_to(place), tempfile.TemporaryFile(dir=place) as probe:
            probe.write(bytes(1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
        raise


def is_full(exc: OSError) -> bool:
    """Return whether `exc` says that there is no space, on the disk or in a quota."""
    return exc.errno in _FULL


def unwritable(exc: OSError, place: Path | None = None) -> PrerequisiteError | None:
    """Return what to tell a user of `exc`; None where it is not about space or permission."""
    if exc.errno not in _REMEDIES:
        return None
    # a full disk shows in whatever file came next: the place says more than its name
    where = (
        place
        if place is not None and (exc.errno in _FULL or exc.filename is None)
        else exc.filename
    )
    named = "" if where is None else f"{os.fsdecode(where)}: "
    return PrerequisiteError(
        f"{named}{os.strerror(exc.errno)}; {_REMEDIES[exc.errno]}, or choose another place, and run"
        " the same command again: what was finished is kept"
    )
