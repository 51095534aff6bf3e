"""A trained model as a model repository of the hub: one commit, verified by digest, private unless
it is there already.

Nothing is pushed unless asked. What the hub has is not sent again, so a push that was stopped goes
on when it is repeated; what lies here is never touched.
"""

import contextlib
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from shared.errors import (
    ChecksumError,
    ConfigError,
    IncompleteArtifactError,
    PrerequisiteError,
    one_line,
)
from shared.hashing import sha256_file
from train.run.directory import RunDir

T = TypeVar("T")

logger = logging.getLogger(__name__)

_RETRY_SECONDS = (1.0, 3.0, 9.0)
NO_DIGESTS: Mapping[str, str] = MappingProxyType({})
_BUSY = (429, 500, 502, 503, 504)
# HfHubHTTPError derives from the client's HTTPError: httpx's or httpx2's, depending on its release
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


Content = Path | bytes


def check_access(repo: str) -> None:
    """Make the hub repository `repo`, private, unless it is there. Raises ConfigError or
    PrerequisiteError."""
    with _told(repo, None):
        _retrying(
            lambda: HfApi(library_name="sft-train").create_repo(repo, private=True, exist_ok=True)
        )


def push_model(path: Path, repo: str) -> str:
    """Push the model of the run, or the exported model, at `path` to the hub repository `repo`;
    return its address.

    Raises IncompleteArtifactError without a model, and what `sync` raises.
    """
    folder = (
        RunDir(path).model
        if (path / "config.json").exists() and RunDir(path).model.is_dir()
        else path
    )
    files: dict[str, Content] = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    if (
        not {"model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"}
        & files.keys()
    ):
        what = "holds no exported model" if path.exists() else "does not exist"
        raise IncompleteArtifactError(
            f"{path} {what}; give the directory of a run that is complete, or a checkpoint"
        )
    return sync(
        repo,
        files,
        source=folder,
        message=f"Trained by sft-train: {folder.parent.name}",
        is_ours=_is_weights,
    )


def sync(
    repo: str,
    files: Mapping[str, Content],
    *,
    source: Path,
    message: str,
    is_ours: Callable[[str], bool],
    branch: str | None = None,
    digests: Mapping[str, str] = NO_DIGESTS,
) -> str:
    """Make a branch (default: main) of the hub repository `repo` hold `files`, in one commit;
    return its address.

    What it holds already is not sent, and what `is_ours` and not among `files` is removed there. A
    repository that is made is private. `digests`: the sha256 that files must have. `source` is for
    messages. Raises ConfigError for a bad name, PrerequisiteError for what the hub or the network
    does not let through (repeat it), and ChecksumError if a file here, or the hub afterwards, holds
    other bytes.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()  # the client draws them into files too
    check_access(repo)
    api = HfApi(library_name="sft-train")
    with _told(repo, source):
        if branch is not None:
            _retrying(lambda: api.create_branch(repo, branch=branch, exist_ok=True))
        head, held = _look(api, repo, branch)
        new = [
            name
            for name, content in files.items()
            if not _is_same(held.get(name), content, digests.get(name))
        ]
        added = [CommitOperationAdd(name, files[name]) for name in new]
        hashed = {operation.path_in_repo: operation.upload_info.sha256.hex() for operation in added}
        _check_digests(hashed, digests, source)
        gone = [CommitOperationDelete(name) for name in held if is_ours(name) and name not in files]
        if added or gone:
            logger.info("pushing %d of %d files of %s to %s", len(added), len(files), source, repo)
            _retrying(
                lambda: api.create_commit(
                    repo,
                    [*added, *gone],
                    commit_message=message,
                    revision=branch,
                    parent_commit=head,
                )
            )
            _, held = _look(api, repo, branch)
    known = {**digests, **hashed}  # large files are not read again
    wrong = [
        name
        for name, content in files.items()
        if not _is_same(held.get(name), content, known.get(name))
    ]
    if wrong:
        raise ChecksumError(
            f"{repo} does not hold {', '.join(wrong)} as {source} does; push it again"
        )
    return f"{api.endpoint}/{repo}" if branch is None else f"{api.endpoint}/{repo}/tree/{branch}"


@contextlib.contextmanager
def _told(repo: str, source: Path | None) -> Iterator[None]:
    """Turn what the hub's client raises into errors of ours."""
    safe = "" if source is None else f"; all is safe in {source}"
    try:
        yield
    except HFValidationError as exc:
        raise ConfigError(
            f"{repo!r} is not the name of a hub repository; expected user/name"
        ) from exc
    except OfflineModeIsEnabled as exc:
        raise PrerequisiteError(
            f"cannot push to {repo}: offline mode is on; unset HF_HUB_OFFLINE{safe}"
        ) from exc
    except HfHubHTTPError as exc:
        raise PrerequisiteError(
            f"cannot push to {repo}: {_explained(exc.response.status_code)}{safe}"
        ) from exc
    except (_TRANSPORT_ERROR, OSError, RuntimeError) as exc:
        raise PrerequisiteError(
            f"cannot push to {repo}: {one_line(exc)}; the same command goes on{safe}"
        ) from exc


def _check_digests(hashed: Mapping[str, str], digests: Mapping[str, str], source: Path) -> None:
    """Raise ChecksumError before anything is sent if a file is not what it was written as: the
    client has hashed it."""
    for name, digest in hashed.items():
        if digests.get(name, digest) != digest:
            raise ChecksumError(
                f"{source / name}: its bytes have changed since it was written; it was not pushed"
            )


def _look(api: HfApi, repo: str, branch: str | None) -> tuple[str | None, dict[str, RepoFile]]:
    """Return the newest commit of the branch and its files."""
    head = _retrying(lambda: api.model_info(repo, revision=branch)).sha
    listed = _retrying(lambda: list(api.list_repo_tree(repo, recursive=True, revision=head)))
    return head, {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}


def _is_same(entry: RepoFile | None, content: Content, digest: str | None) -> bool:
    """The hub tells the sha256 of a large file and the git hash of a small one, which may be read
    whole."""
    if entry is None or entry.size != (
        content.stat().st_size if isinstance(content, Path) else len(content)
    ):
        return False
    if entry.lfs is not None and isinstance(content, Path):
        return entry.lfs.sha256 == (digest or sha256_file(content))
    data = content.read_bytes() if isinstance(content, Path) else content
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return (
        entry.blob_id
        == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    )


def _is_weights(name: str) -> bool:
    """Of an older push with more or fewer files: with them the repository would be two models."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _retrying(call: Callable[[], T]) -> T:
    for seconds in _RETRY_SECONDS:
        try:
            return call()
        except HfHubHTTPError as exc:
            if exc.response.status_code not in _BUSY:
                raise
            logger.warning(
                "the hub answered %d; again in %.0f s", exc.response.status_code, seconds
            )
            time.sleep(seconds)
    return call()


def _explained(status: int) -> str:
    if status in (401, 403):
        what = "log in with `hf auth login`, with a token that may write there"
    elif status in (409, 412):
        what = "someone else pushed at the same time; look at it, then push again"
    else:
        what = "try later, the same command goes on"
    return f"the hub answered {status}; {what}"
