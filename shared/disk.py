"""When a file cannot be written: an error that names the directory and the remedy, instead of a
traceback."""

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
    """Turn an OSError about space or permission into a PrerequisiteError that names `place`, or
    the file."""
    try:
        yield
    except OSError as exc:
        error = unwritable(exc, place)
        if error is None:
            raise
        raise error from exc


@contextlib.contextmanager
def library_writing_to(place: Path) -> Iterator[None]:
    """Do as `writing_to`, also for a library that raises its own errors when it cannot write.

    After any foreign exception the disk is tested: if 1 MiB cannot be written, that is the error.
    """
    try:
        with writing_to(place):
            yield
    except SftError:
        raise
    except Exception:
        with writing_to(place), tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        raise


def is_full(exc: OSError) -> bool:
    """Return whether `exc` says that there is no space, on the disk or in a quota."""
    return exc.errno in _FULL


def unwritable(exc: OSError, place: Path | None = None) -> PrerequisiteError | None:
    """Return `exc` as an error that a user can act on; None where it is not about space or
    permission."""
    if exc.errno not in _REMEDIES:
        return None
    # a full disk hits whatever file comes next: the directory says more than that file's name
    where = exc.filename
    if place is not None and (where is None or exc.errno in _FULL):
        where = place
    prefix = "" if where is None else f"{os.fsdecode(where)}: "
    return PrerequisiteError(
        f"{prefix}{os.strerror(exc.errno)}; {_REMEDIES[exc.errno]}, or choose another directory,"
        " and run the same command again: what was finished is kept"
    )
