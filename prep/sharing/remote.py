"""Where a set is pushed to and pulled from: a Place, and the one that is a directory.

    ./NAME, ../NAME, /..., ~/..., or any directory that exists     a directory
    hf://user/name, hf://datasets/user/name, user/name    a data set of the hub (hub_repo.py)

A directory target is made in `.tmp-NAME-push` beside it and renamed when it is whole. A killed push
is taken up there. It takes the place of what an earlier push put there, and of nothing else.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from prep.sharing import replaceable_push
from prep.sharing.wire_format import TRANSFER_NAME, matches
from shared import atomic
from shared.errors import ArtifactError, ConfigError, IncompleteArtifactError
from shared.shard_format import MANIFEST_NAME, FileEntry

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class Remote(Protocol):
    """Files by path. Nothing changes before `begin_write`; `commit` may move what it takes."""

    label: str
    scratch: Path
    """Where files for `commit` are made; valid from `begin_write` on."""

    def paths(self) -> set[str]:
        """Return the paths of all files that are there."""

    def read(self, path: str) -> bytes:
        """Return a small file. Raises IncompleteArtifactError if it is not there."""

    def has(self, path: str, entry: FileEntry, local: Path | None = None) -> bool:
        """Say whether the file at `path` is `entry`, without moving it; `local` is a copy to
        compare with."""

    def local_copy(self, path: str, scratch: Path) -> AbstractContextManager[Path]:
        """Give the local path of a file for the length of the block."""

    def begin_write(self) -> None:
        """Make ready for `commit`, or raise ArtifactError. What was there may be out of sight from
        here on."""

    def commit(
        self, files: Mapping[str, Path | bytes], *, remove: Sequence[str], message: str
    ) -> None:
        """Add files and remove others, all of them or none."""

    def publish(self) -> None:
        """Put what was committed in place."""


def parse_repo(repo: str) -> str | Path:
    """Return the hub id or the directory that `repo` means. Raises ConfigError if it is neither."""
    if repo.startswith("hf://"):
        hub_id = repo.removeprefix("hf://").removeprefix("datasets/")
    elif repo.startswith(("./", "../", "/", "~")) or (repo and Path(repo).is_dir()):
        return Path(repo).expanduser()
    else:
        hub_id = repo
    if not _HUB_ID.fullmatch(hub_id):
        raise ConfigError(
            f"{repo!r} is neither a hub data set (user/name or hf://user/name) nor a directory that"
            f" exists; write ./{hub_id} for a new directory"
        )
    return hub_id


class DirectoryRemote:
    """A pushed set in a directory: as it is until `begin_write`, then as the staged one that will
    take its place."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self._final = path.resolve()  # `.` has a name and a parent too
        self._staging = self._final.with_name(f".tmp-{self._final.name}-push")
        self._root = self._final
        self.scratch = self._staging / ".scratch"
        if path.exists() and not path.is_dir():
            raise ArtifactError(
                f"{path} is a file; expected a directory that a set was pushed to, or a new one"
            )
        if path.is_dir() and any(path.iterdir()) and not (path / TRANSFER_NAME).is_file():
            what = (
                "a shard set" if (path / MANIFEST_NAME).is_file() else "a directory of other files"
            )
            raise ArtifactError(
                f"{path} is {what}, not a place that a set was pushed to (it has no"
                f" {TRANSFER_NAME}); give another"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Guard a push: one at a time, and a full disk is left as it was found."""
        try:
            with atomic.exclusive_lock(
                self._final.with_name(f".{self._final.name}.lock"), f"writing {self.label}"
            ):
                yield
        except OSError as exc:
            if self._root == self._staging:
                shutil.rmtree(self._staging, ignore_errors=True)
            raise ArtifactError(
                f"cannot push to {self.label}: {exc.strerror or exc}; what was written is removed"
                " again"
            ) from exc

    def paths(self) -> set[str]:
        files = (path for path in self._root.rglob("*") if path.is_file())
        return {path.relative_to(self._root).as_posix() for path in files}

    def read(self, path: str) -> bytes:
        try:
            return (self._root / path).read_bytes()
        except FileNotFoundError as exc:
            raise IncompleteArtifactError(
                f"{self.label} has no {path}; push the set again"
            ) from exc

    def has(self, path: str, entry: FileEntry, local: Path | None = None) -> bool:
        return matches(self._root / path, entry)

    @contextlib.contextmanager
    def local_copy(self, path: str, scratch: Path) -> Iterator[Path]:
        file = self._root / path
        if not file.is_file():
            raise IncompleteArtifactError(f"{self.label} has no {path}; push the set again")
        yield file

    def begin_write(self) -> None:
        replaceable_push.check_replaceable(self._final)
        replaceable_push.check_staging(self._staging)
        self._root = self._staging
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)

    def commit(
        self, files: Mapping[str, Path | bytes], *, remove: Sequence[str], message: str
    ) -> None:
        for path, content in files.items():
            target = self._staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                atomic.write_bytes(target, content)
            elif content.is_relative_to(self.scratch):
                os.replace(content, target)
            else:
                shutil.copyfile(content, target)
        for path in remove:
            (self._staging / path).unlink(missing_ok=True)

    def publish(self) -> None:
        shutil.rmtree(self.scratch)
        atomic.fsync_tree(self._staging)
        atomic.replace_dir(self._staging, self._final, remove_old=replaceable_push.remove)
