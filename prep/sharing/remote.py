"""Where a set is pushed to and pulled from: a Remote, and the one that is a directory.

    ./NAME, ../NAME, /..., ~/..., or any directory that exists     a directory
    hf://user/name, hf://datasets/user/name, user/name    a data set of the hub (hub_repo.py)

A directory is written as `.tmp-NAME-push` beside it and renamed when it is whole. A push after a
killed one resumes there. It replaces what an earlier push put there, and nothing else.
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
    """Files by path. Nothing changes before `begin_write`; `commit` may move the files it takes."""

    label: str
    scratch: Path
    """Directory for the files of a `commit`; valid from `begin_write` on."""

    def look(self) -> None:
        """Make ready to read. Raises ArtifactError if there is no such remote."""

    def writing(self) -> AbstractContextManager[None]:
        """Guard a push for the length of the block."""

    def paths(self) -> set[str]:
        """Return the paths of all files that are there."""

    def read(self, path: str) -> bytes:
        """Return a small file. Raises IncompleteArtifactError if it is not there."""

    def has(self, path: str, entry: FileEntry, local: Path | None = None) -> bool:
        """Return whether the file at `path` is `entry`, without moving it; `local` is a copy to
        compare with."""

    def local_copy(self, path: str, scratch: Path) -> AbstractContextManager[Path]:
        """Yield the path of a local copy that exists for the length of the block."""

    def begin_write(self) -> None:
        """Make ready for `commit`, or raise ArtifactError. From here on the files that were there
        may be hidden."""

    def commit(
        self, files: Mapping[str, Path | bytes], *, remove: Sequence[str], message: str
    ) -> None:
        """Add files and remove others, all of them or none."""

    def publish(self) -> None:
        """Put what was committed in place."""


def open_remote(repo: str, *, revision: str | None, public: bool, workers: int) -> Remote:
    """Return the remote that `repo` means; `public` is for a hub data set that a push creates."""
    target = parse_repo(repo)
    if isinstance(target, Path):
        if revision is not None:
            raise ConfigError(f"--revision is for hub data sets, {target} is a directory")
        return DirectoryRemote(target)
    from prep.sharing.hub_repo import HubRemote, Visibility

    visibility = Visibility.PUBLIC if public else Visibility.PRIVATE
    return HubRemote(target, revision=revision, visibility=visibility, workers=workers)


def parse_repo(repo: str) -> str | Path:
    """Return the hub id or the directory that `repo` means. Raises ConfigError if it is neither."""
    if repo.startswith("hf://"):
        hub_id = repo.removeprefix("hf://").removeprefix("datasets/")
    elif repo.startswith(("./", "../", "/", "~")) or (repo and Path(repo).is_dir()):
        return Path(repo).expanduser()
    else:
        hub_id = repo
    # user/name is a hub data set even where a file has that path: only directories are meant
    if not _HUB_ID.fullmatch(hub_id):
        raise ConfigError(
            f"{repo!r} is neither a hub data set (user/name or hf://user/name) nor a directory that"
            f" exists; write ./{hub_id} for a new directory"
        )
    return hub_id


class DirectoryRemote:
    """A pushed set in a directory: until `begin_write` that directory, then the staged one that
    will replace it."""

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
            is_set = (path / MANIFEST_NAME).is_file()
            raise ArtifactError(
                f"{path} is {'a shard set' if is_set else 'a directory of other files'}, not a"
                f" place that a set was pushed to (it has no {TRANSFER_NAME}); give another"
            )

    def look(self) -> None:
        """Nothing to do: files are read where they are."""

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Allow one push at a time; after an error of the disk, remove what it wrote."""
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
            # a compressed column is ours and on the same disk; a file of the set stays where it is
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
