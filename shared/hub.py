"""The client of the hub, as both programs use it: retries, its errors in our words, file identity.

The one module of `shared` that imports huggingface_hub, so it is imported only where a command is
about to talk to the hub. What the client does by itself (resume uploads and downloads, skip files
that the hub has) is left to it.
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from shared.errors import ArtifactError, ConfigError, PrerequisiteError, SftError, one_line
from shared.hashing import sha256_bytes, sha256_file

T = TypeVar("T")

logger = logging.getLogger(__name__)

# HfHubHTTPError derives from the client's HTTPError: httpx's or httpx2's, depending on its release
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
NO_ANSWER = (_TRANSPORT_ERROR, HFValidationError, OSError)
"""What a call ends with where the hub does not give what was asked for, whatever the cause."""

_BUSY = (429, 500, 502, 503, 504)
_RETRY_SECONDS = (1.0, 3.0, 9.0)


def retrying(call: Callable[[], T]) -> T:
    """Return what `call` returns, called again while the hub is busy.

    For calls that the client makes once: to create a repository or branch, to read its head, to
    commit, and to begin a download. Uploads and listings have retries inside the client.
    """
    for seconds in _RETRY_SECONDS:
        try:
            return call()
        except HfHubHTTPError as exc:
            status = exc.response.status_code
            if status not in _BUSY:
                raise
            logger.warning("the hub answered %d; again in %.0f s", status, seconds)
            time.sleep(seconds)
    return call()


@contextlib.contextmanager
def translate_hub_errors(action: str, *, hint: str = "") -> Iterator[None]:
    """Turn what the client raises in the block into one line "cannot ACTION: reason; remedy"."""
    try:
        yield
    except SftError:
        raise
    except Exception as exc:
        package = type(exc).__module__.partition(".")[0]  # its errors have no common base
        is_ours = not isinstance(exc, (*NO_ANSWER, ValueError, RuntimeError))
        if is_ours and package not in ("huggingface_hub", "hf_xet"):
            raise
        kind, reason = _explain(exc)
        raise kind(f"cannot {action}: {reason}{hint}") from exc


def is_on_hub(
    listed: RepoFile | None,
    *,
    num_bytes: int,
    sha256: str | None = None,
    content: Path | bytes | None = None,
) -> bool:
    """Return whether the file that the hub lists has these bytes.

    The hub lists the sha256 of a large file and the git hash of a small one. `sha256` saves hashing
    `content`; a small file cannot be recognised without its content.
    """
    if listed is None or listed.size != num_bytes:
        return False
    if listed.lfs is None:
        if content is None:
            return False
        data = content if isinstance(content, bytes) else content.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        return listed.blob_id == blob.hexdigest()
    if sha256 is None:
        assert content is not None
        sha256 = sha256_bytes(content) if isinstance(content, bytes) else sha256_file(content)
    return listed.lfs.sha256 == sha256


def _explain(exc: BaseException) -> tuple[type[SftError], str]:
    """Return the kind of error that a client error is to a user, and what to say of it."""
    # the client wraps the error of an upload, and that of a first look at a file
    while isinstance(exc, RuntimeError | LocalEntryNotFoundError) and exc.__cause__ is not None:
        exc = exc.__cause__
    if isinstance(exc, HFValidationError):
        return ConfigError, "that is not the name of a hub repository; expected user/name"
    if isinstance(exc, OfflineModeIsEnabled):
        return PrerequisiteError, "offline mode is on; unset HF_HUB_OFFLINE"
    if not isinstance(exc, HfHubHTTPError):
        if isinstance(exc, _TRANSPORT_ERROR | ConnectionError):
            return PrerequisiteError, f"{one_line(exc)}; check your network, then run it again"
        if isinstance(exc, OSError) and exc.errno is not None:
            return (
                ArtifactError,
                f"{exc.strerror}; make room or change permissions, then run it again",
            )
        return ArtifactError, one_line(exc)
    status = exc.response.status_code
    kind: type[SftError] = ArtifactError
    if isinstance(exc, GatedRepoError) or status in (401, 403):
        kind = PrerequisiteError
        remedy = "log in with `hf auth login`, with a token that is allowed to do that"
        remedy += "; 401 may also mean that it does not exist" if status == 401 else ""
    elif isinstance(exc, RepositoryNotFoundError):
        remedy = "there is no such repository, or your token does not see it"
    elif isinstance(exc, RevisionNotFoundError):
        remedy = "there is no such revision; give another"
    elif status in (409, 412):
        remedy = "someone else pushed at the same time; look at it, then push again"
    elif status in _BUSY:
        kind, remedy = PrerequisiteError, "try later, the same command resumes"
    else:
        remedy = one_line(exc)
    return kind, f"the hub answered {status}; {remedy}"
