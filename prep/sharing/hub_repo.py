"""A data set of the hub as a Place, through `huggingface_hub`: large files by LFS or Xet, one
commit per call.

A file is known to be there by what the hub lists: the sha256 of a large file, the git hash of a
small one. A push names the commit that it builds on, so two at once can't mix. All errors of the
client become one line here.
"""

import contextlib
import errno
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from shared.errors import (
    ArtifactError,
    ConfigError,
    IncompleteArtifactError,
    PrerequisiteError,
    SftError,
    one_line,
)
from shared.shard_format import FileEntry

T = TypeVar("T")

logger = logging.getLogger(__name__)

_KIND = "dataset"
_MAIN = "main"
_RETRY_SECONDS = (1.0, 3.0, 9.0)  # for what the client itself does not try again
_BUSY = (429, 500, 502, 503, 504)


class Visibility(StrEnum):
    PRIVATE = "private"
    PUBLIC = "public"


class HubRemote:
    """One revision of a data set of the hub. It need not exist before `begin_write`."""

    def __init__(
        self, hub_id: str, *, revision: str | None, visibility: Visibility, workers: int
    ) -> None:
        self.label = f"the hub data set {hub_id}" + (f" at {revision}" if revision else "")
        self._id = hub_id
        self._revision = revision or _MAIN
        self._visibility = visibility
        self._workers = workers
        self._api = HfApi(library_name="sft-prep")
        self._head: str | None = None  # the commit that all reading is pinned to
        self._is_private: bool | None = None
        self._files: dict[str, RepoFile] = {}
        disable_progress_bars()  # ours counts the whole set

    def look(self) -> None:
        """List what is there now. Raises ArtifactError if there is no such data set or revision."""
        with self._errors("read"):
            self._look()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Look at what is there, if there is anything; keep the scratch of a push."""
        with (
            self._errors("read"),
            contextlib.suppress(RevisionNotFoundError, RepositoryNotFoundError),
        ):
            self._look()
        try:
            with tempfile.TemporaryDirectory(prefix="sft-prep-push-") as scratch:
                self.scratch = Path(scratch)
                yield
        except OSError as exc:
            raise ArtifactError(
                f"cannot push to {self.label}: {exc.strerror or exc}; a shard is compressed into "
                f"{tempfile.gettempdir()} first, name a larger place with TMPDIR"
            ) from exc

    def paths(self) -> set[str]:
        return set(self._files)

    def read(self, path: str) -> bytes:
        with tempfile.TemporaryDirectory() as scratch, self.local_copy(path, Path(scratch)) as file:
            return file.read_bytes()

    def has(self, path: str, entry: FileEntry, local: Path | None = None) -> bool:
        file = self._files.get(path)
        if file is None or file.size != entry.bytes:
            return False
        if file.lfs is not None:
            return file.lfs.sha256 == entry.sha256
        return local is not None and file.blob_id == _git_hash(local)

    @contextlib.contextmanager
    def local_copy(self, path: str, scratch: Path) -> Iterator[Path]:
        with self._errors("download"):
            if path not in self._files:
                raise IncompleteArtifactError(f"{self.label} has no {path}; push the set again")
            file = Path(
                self._retrying(
                    lambda: self._api.hf_hub_download(
                        self._id, path, repo_type=_KIND, revision=self._head, local_dir=scratch
                    )
                )
            )
        yield file
        file.unlink()

    def begin_write(self) -> None:
        with self._errors("create"):
            if self._head is None:
                private = self._visibility is Visibility.PRIVATE
                self._retrying(
                    lambda: self._api.create_repo(
                        self._id, repo_type=_KIND, private=private, exist_ok=True
                    )
                )
                if self._revision != _MAIN:
                    self._retrying(
                        lambda: self._api.create_branch(
                            self._id, branch=self._revision, repo_type=_KIND, exist_ok=True
                        )
                    )
            self._look()
        if self._visibility is Visibility.PRIVATE and self._is_private is False:
            raise ConfigError(
                f"{self.label} is public; say --public to push to it, or give another"
            )
        if self._visibility is Visibility.PUBLIC and self._is_private:
            logger.warning("%s is private and stays so: change that on the hub", self.label)

    def commit(
        self, files: Mapping[str, Path | bytes], *, remove: Sequence[str], message: str
    ) -> None:
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(path, is_folder=False) for path in remove
        ]
        operations += [CommitOperationAdd(path, content) for path, content in files.items()]
        with self._errors("push to"):
            done = self._retrying(
                lambda: self._api.create_commit(
                    self._id,
                    operations,
                    commit_message=message,
                    repo_type=_KIND,
                    revision=self._revision,
                    parent_commit=self._head,
                    num_threads=self._workers,
                )
            )
        self._head = done.oid

    def publish(self) -> None:
        """Nothing is left to do: the last commit put it in place."""

    def _look(self) -> None:
        info = self._retrying(lambda: self._api.dataset_info(self._id, revision=self._revision))
        self._head, self._is_private = info.sha, info.private
        listed = self._api.list_repo_tree(
            self._id, recursive=True, revision=self._head, repo_type=_KIND
        )
        self._files = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}

    def _retrying(self, call: Callable[[], T]) -> T:
        for seconds in _RETRY_SECONDS:
            try:
                return call()
            except HfHubHTTPError as exc:
                if exc.response.status_code not in _BUSY:
                    raise
                logger.warning(
                    "%s answered %d; again in %.0f s", self.label, exc.response.status_code, seconds
                )
                time.sleep(seconds)
        return call()

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except SftError:
            raise
        except Exception as exc:
            if not isinstance(exc, OSError | ValueError | RuntimeError) and not _is_of_client(exc):
                raise
            raise self._explained(exc, f"cannot {doing} {self.label}") from exc

    def _explained(self, exc: BaseException, what: str) -> SftError:
        """Return what a user can do about an error of the client."""
        while isinstance(exc, RuntimeError | LocalEntryNotFoundError) and exc.__cause__ is not None:
            exc = (
                exc.__cause__
            )  # it wraps the error of an upload, and that of a first look at a file
        if isinstance(exc, OfflineModeIsEnabled):
            return PrerequisiteError(
                f"{what}: offline mode is on; unset HF_HUB_OFFLINE, or give a directory"
            )
        if isinstance(exc, HfHubHTTPError):
            return _explained_answer(exc, what)
        if isinstance(exc, _TRANSPORT_ERROR):
            return PrerequisiteError(
                f"{what}: {one_line(exc)}; look at your network, the same command goes on"
            )
        if isinstance(exc, OSError) and exc.errno is not None:
            kept = ", free some space" if exc.errno == errno.ENOSPC else ""
            return ArtifactError(f"{what}: {exc.strerror}{kept}; the same command goes on")
        return ArtifactError(f"{what}: {one_line(exc)}")


# HfHubHTTPError derives from the client's HTTPError: httpx's or httpx2's, depending on its release
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def _is_of_client(exc: Exception) -> bool:
    """Say whether the client raised it: its errors have no common base."""
    root = type(exc).__module__.partition(".")[0]
    return isinstance(exc, _TRANSPORT_ERROR) or root in ("huggingface_hub", "hf_xet")


def _explained_answer(exc: HfHubHTTPError, what: str) -> SftError:
    status = exc.response.status_code
    answer = f"{what}: the hub answered {status}"
    if isinstance(exc, GatedRepoError) or status in (401, 403):
        return PrerequisiteError(
            f"{answer}: it is not yours to use, or (401) not there; log in with `hf auth login`,"
            " with a token that may"
        )
    if isinstance(exc, RepositoryNotFoundError):
        return ArtifactError(f"{answer}: there is no such data set, or your token does not see it")
    if isinstance(exc, RevisionNotFoundError):
        return ArtifactError(f"{answer}: it has no such revision; give another --revision")
    if status in (409, 412):
        return ArtifactError(
            f"{answer}: someone else pushed to it at the same time; look at it, then push again"
        )
    if status in _BUSY:
        return PrerequisiteError(f"{answer}; try later, the same command goes on")
    return ArtifactError(f"{answer}: {one_line(exc)}")


def _git_hash(path: Path) -> str:
    """Return the git blob id of a file, as the hub gives it for small ones; they may be read
    whole."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
