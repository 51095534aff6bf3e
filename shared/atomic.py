"""Files and directories that are whole or absent: written beside their place, flushed to disk, then
renamed.

A reader never sees half an artefact, and a crash leaves at worst a `.tmp-*` sibling, which the next
writer removes.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.disk import unwritable
from shared.errors import ArtifactError
from shared.hashing import canonical_json


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one rename. On any error the old file stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = _free_name(path)
    try:
        with staging.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    # the rename itself is an entry of the directory: unflushed, a power cut could undo it
    fsync_dir(path.parent)


def write_json(path: Path, value: object) -> None:
    """Replace `path` by the canonical JSON of `value`."""
    write_bytes(path, canonical_json(value))


@contextlib.contextmanager
def staged_dir(
    final: Path,
    *,
    durable: bool = True,
    remove_old: Callable[[Path], object] | None = None,
    old: Path | None = None,
) -> Iterator[Path]:
    """Yield an empty directory beside `final`; on success it becomes `final`, on any error it is
    removed.

    `durable` flushes everything to disk first, so that even a power cut leaves no half directory;
    without it only the rename is atomic, which is enough against a killed process.

    With `remove_old` the directory replaces what is at `final`, as `replace_dir` does. Without it,
    raises ArtifactError if `final` holds anything when the block ends.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = _free_name(final)
    staging.mkdir()
    try:
        yield staging
        if durable:
            fsync_tree(staging)
        if remove_old is None:
            _rename_to_free_name(staging, final)
        else:
            replace_dir(staging, final, remove_old=remove_old, old=old)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if durable:
        fsync_dir(final.parent)


def replace_dir(
    staged: Path,
    final: Path,
    *,
    remove_old: Callable[[Path], object] = shutil.rmtree,
    old: Path | None = None,
) -> None:
    """Replace the directory `final` by `staged`. The old one is moved out of the way first and
    removed last.

    `remove_old` removes only the files that its caller wrote. A crash between the two renames
    leaves no `final`, but the old one beside it, as `old` or by default `.tmp-NAME-NUMBER-old`; an
    error between them puts the old one back.
    """
    # Python has no call that exchanges two directories, so there is a moment without `final`: a
    # reader that comes then finds nothing, but never half
    old = old or _free_name(final, "-old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, old)
    try:
        os.rename(staged, final)
    except BaseException:
        # lexists, not exists: `final` may have been a link to nothing, which is put back too
        if os.path.lexists(old):
            os.rename(old, final)
        raise
    fsync_dir(final.parent)
    if os.path.lexists(old):
        remove_old(old)


def remove_leftovers(parent: Path, names: str) -> None:
    """Remove the unfinished files and directories of dead writers in `parent` whose final names
    match the pattern `names`.

    `parent` is a directory of ours: whatever has such a name there counts as ours. Call it only
    while holding the lock that guards those names: it would remove live work too.
    """
    leftover = re.compile(rf"\.tmp-(?:{names})-\d+(-old)?", re.DOTALL)
    for path in parent.glob(".tmp-*"):
        if not leftover.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive_lock(path: Path, doing: str) -> Iterator[None]:
    """Hold an advisory lock on `path` while the block runs; the kernel releases it if the process
    dies. Raises ArtifactError if another process holds it.

    It excludes other processes, not a second block in this one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")  # leaves what is in it
    except OSError as exc:
        if unwritable(exc) is not None:
            raise
        raise ArtifactError(
            f"cannot open the lock {path}: {exc.strerror}; choose another directory"
        ) from exc
    # a POSIX record lock, not flock: worker processes inherit a flock, and the orphans of a killed
    # build would keep it
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as exc:
            raise ArtifactError(
                f"another process is {doing} (it holds the lock {path}); wait for it to end, or"
                " stop it"
            ) from exc
        yield


def fsync_tree(root: Path) -> None:
    """Flush every file and directory below `root` to disk."""
    for folder, _, names in os.walk(root):
        for name in names:
            _fsync_path(Path(folder) / name)
        _fsync_path(Path(folder))


def fsync_dir(path: Path) -> None:
    """Flush the entries of a directory, so that a rename in it survives a power cut."""
    _fsync_path(path)


def _free_name(path: Path, ending: str = "") -> Path:
    """Return an unused name beside `path`: a foreign file that happens to be called like ours is
    not overwritten."""
    number = os.getpid()
    while os.path.lexists(free := path.with_name(f".tmp-{path.name}-{number}{ending}")):
        number += 1 << 22  # above the largest process number of Linux
    return free


def _rename_to_free_name(staging: Path, final: Path) -> None:
    try:
        os.rename(staging, final)
    except OSError as exc:
        if exc.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ArtifactError(
                f"{final} appeared while it was being built; look at it, then remove one"
            ) from exc
        raise


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
