"""A trained model as a model repository of the hub: one commit, verified by digest, private unless it is there already.

Nothing is pushed unless asked. What the hub has is not sent again, so a push that was stopped goes on when it is
repeated; the local model is never touched.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from shared.errors import ChecksumError, ConfigError, IncompleteArtifactError, PrerequisiteError
from shared.hashing import sha256_file
from train.run_dir import RunDir

T = TypeVar("T")

logger = logging.getLogger(__name__)

_RETRY_SECONDS = (1.0, 3.0, 9.0)
_BUSY = (429, 500, 502, 503, 504)
# HfHubHTTPError derives from the client's HTTPError: httpx's or httpx2's, depending on its release
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def push_model(path: Path, repo: str) -> str:
    """Push the model of the run, or the exported model, at `path` to the hub repository `repo`; return its address.

    A repository that is made is private. Raises IncompleteArtifactError without a model, ConfigError for a bad name,
    PrerequisiteError for what the hub or the network does not let through (repeat it), and ChecksumError if the hub
    holds other bytes afterwards.
    """
    folder = RunDir(path).model if (path / "config.json").exists() and RunDir(path).model.is_dir() else path
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    if not {"model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"} & files.keys():
        raise IncompleteArtifactError(f"{path} holds no exported model; give the directory of a run that is complete")
    disable_progress_bars()
    api = HfApi(library_name="sft-train")
    try:
        _retrying(lambda: api.create_repo(repo, private=True, exist_ok=True))
        head, held = _look(api, repo)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, file) for name, file in files.items() if not _is_same(held.get(name), file)
        ]
        operations += [CommitOperationDelete(name) for name in held if _is_weights(name) and name not in files]
        if operations:
            logger.info("pushing %d of %d files to %s", len(operations), len(files), repo)
            message = f"Trained by sft-train: {folder.parent.name}"
            _retrying(lambda: api.create_commit(repo, operations, commit_message=message, parent_commit=head))
            _, held = _look(api, repo)
    except HFValidationError as exc:
        raise ConfigError(f"{repo!r} is not the name of a hub repository; expected user/name") from exc
    except OfflineModeIsEnabled as exc:
        raise PrerequisiteError(f"cannot push to {repo}: offline mode is on; unset HF_HUB_OFFLINE") from exc
    except HfHubHTTPError as exc:
        raise PrerequisiteError(_explained(repo, folder, exc)) from exc
    except (_TRANSPORT_ERROR, OSError, RuntimeError) as exc:
        raise PrerequisiteError(
            f"cannot push to {repo}: {_one_line(exc)}; the model is safe in {folder}, the same command goes on"
        ) from exc
    wrong = [name for name, file in files.items() if not _is_same(held.get(name), file)]
    if wrong:
        raise ChecksumError(f"{repo} does not hold {', '.join(wrong)} as {folder} does; push it again")
    return f"{api.endpoint}/{repo}"


def _look(api: HfApi, repo: str) -> tuple[str | None, dict[str, RepoFile]]:
    """Return the newest commit and its files."""
    head = _retrying(lambda: api.model_info(repo)).sha
    listed = api.list_repo_tree(repo, recursive=True, revision=head)
    return head, {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}


def _is_same(entry: RepoFile | None, file: Path) -> bool:
    """The hub tells the sha256 of a large file and the git hash of a small one, which may be read whole."""
    if entry is None or entry.size != file.stat().st_size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == sha256_file(file)
    data = file.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


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
            logger.warning("the hub answered %d; again in %.0f s", exc.response.status_code, seconds)
            time.sleep(seconds)
    return call()


def _explained(repo: str, folder: Path, exc: HfHubHTTPError) -> str:
    status = exc.response.status_code
    if status in (401, 403):
        what = "log in with `hf auth login`, with a token that may write there"
    elif status in (409, 412):
        what = "someone else pushed at the same time; look at it, then push again"
    else:
        what = "try later, the same command goes on"
    return f"cannot push to {repo}: the hub answered {status}; {what}. The model is safe in {folder}"


def _one_line(exc: BaseException) -> str:
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
