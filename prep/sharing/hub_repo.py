"""A data set of the hub as a Remote, through `huggingface_hub`: large files by LFS or Xet.

Each `commit` is one commit of the repository and names the one that it builds on, so that two
pushes at once cannot mix.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from shared.errors import ArtifactError, ConfigError, IncompleteArtifactError
from shared.hub import is_on_hub, retrying, translate_hub_errors
from shared.shard_format import FileEntry

logger = logging.getLogger(__name__)

_KIND = "dataset"
_MAIN = "main"


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
        """List the files that are there now. Raises ArtifactError if there is no such data set or
        revision."""
        with translate_hub_errors(f"read {self.label}"):
            self._list_files()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Open a push: list what is there, if anything is, and keep a scratch directory."""
        with (
            translate_hub_errors(f"read {self.label}"),
            contextlib.suppress(RevisionNotFoundError, RepositoryNotFoundError),
        ):
            self._list_files()
        try:
            with tempfile.TemporaryDirectory(prefix="sft-prep-push-") as scratch:
                self.scratch = Path(scratch)
                yield
        except OSError as exc:
            raise ArtifactError(
                f"cannot push to {self.label}: {exc.strerror or exc}; a shard is compressed into "
                f"{tempfile.gettempdir()} first, name a larger directory with TMPDIR"
            ) from exc

    def paths(self) -> set[str]:
        return set(self._files)

    def read(self, path: str) -> bytes:
        with tempfile.TemporaryDirectory() as scratch, self.local_copy(path, Path(scratch)) as file:
            return file.read_bytes()

    def has(self, path: str, entry: FileEntry, local: Path | None = None) -> bool:
        return is_on_hub(
            self._files.get(path), num_bytes=entry.bytes, sha256=entry.sha256, content=local
        )

    @contextlib.contextmanager
    def local_copy(self, path: str, scratch: Path) -> Iterator[Path]:
        if path not in self._files:
            raise IncompleteArtifactError(f"{self.label} has no {path}; push the set again")
        with translate_hub_errors(f"download {self.label}"):
            file = retrying(
                lambda: self._api.hf_hub_download(
                    self._id, path, repo_type=_KIND, revision=self._head, local_dir=scratch
                )
            )
        yield Path(file)
        Path(file).unlink()

    def begin_write(self) -> None:
        with translate_hub_errors(f"create {self.label}"):
            if self._head is None:
                private = self._visibility is Visibility.PRIVATE
                retrying(
                    lambda: self._api.create_repo(
                        self._id, repo_type=_KIND, private=private, exist_ok=True
                    )
                )
                if self._revision != _MAIN:
                    retrying(
                        lambda: self._api.create_branch(
                            self._id, branch=self._revision, repo_type=_KIND, exist_ok=True
                        )
                    )
            self._list_files()
        if self._visibility is Visibility.PRIVATE and self._is_private is False:
            raise ConfigError(
                f"{self.label} is public; say --public to push to it, or give another"
            )
        if self._visibility is Visibility.PUBLIC and self._is_private:
            logger.warning("%s is private and stays so: change that on the hub", self.label)

    # Why not HfApi.upload_folder (huggingface_hub 2.4), which also resumes and skips what is there:
    # it commits in the order of paths, manifest.json before shards/; it cuts a large folder into
    # several commits, of which only the first has a parent_commit, so that another push could come
    # between; it wants the whole set compressed on disk; and without Xet it is one create_commit
    # that is not retried. create_commit sends no object that the hub has, either.
    def commit(
        self, files: Mapping[str, Path | bytes], *, remove: Sequence[str], message: str
    ) -> None:
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(path, is_folder=False) for path in remove),
            *(CommitOperationAdd(path, content) for path, content in files.items()),
        ]
        with translate_hub_errors(f"push to {self.label}"):
            done = retrying(
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
        """Nothing is left to do: the last commit put the set in place."""

    def _list_files(self) -> None:
        info = retrying(lambda: self._api.dataset_info(self._id, revision=self._revision))
        self._head, self._is_private = info.sha, info.private
        listed = self._api.list_repo_tree(
            self._id, recursive=True, revision=self._head, repo_type=_KIND
        )
        self._files = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
