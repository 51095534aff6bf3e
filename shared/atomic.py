"""Files and directories that are whole or absent: written aside, flushed to disk, then renamed.

A reader never sees half an artefact, and a crash leaves at worst a `.tmp-*` sibling, which the next writer removes.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from shared.errors import ArtifactError
from shared.hashing import canonical_json


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: object) -> None:
    """Replace `path` by the canonical JSON of `value`."""
    write_bytes(path, canonical_json(value))


@contextlib.contextmanager
def staged_dir(final: Path) -> Iterator[Path]:
    """Yield an empty directory beside `final`; on success it becomes `final`, on any error it is removed.

    `final` must not exist when the block ends: the caller removes what it means to replace (see `replace_dir`).
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        fsync_tree(aside)
        os.rename(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_dir(final.parent)


def replace_dir(staged: Path, final: Path) -> None:
    """Put the directory `staged` in the place of `final`. The old one is moved aside first and removed last."""
    old = final.with_name(f".tmp-old-{final.name}-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(staged, final)
    fsync_dir(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove what dead writers left in `parent`. Call it only while holding the lock that guards `parent`."""
    for path in parent.glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive_lock(path: Path, doing: str) -> Iterator[None]:
    """Hold an advisory lock on `path` while the block runs; the kernel releases it if the process dies.

    Raises ArtifactError if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ArtifactError(
                f"another process is {doing} (it holds the lock {path}); wait for it to end, or stop it"
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


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
