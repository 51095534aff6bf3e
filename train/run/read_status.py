"""How a run ended, from status.json: torchrun turns every failure into exit code 1, and a stop on
request into 0."""

import time
from pathlib import Path
from typing import Any

from shared.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    PrerequisiteError,
    SftError,
    StoppedOnRequest,
)
from train.run.directory import RunDir, read_status
from train.run.prepare import Prepared

_SECONDS_BETWEEN_LOOKS = 1.0
_ERRORS: dict[object, type[SftError]] = {
    error.exit_code: error
    for error in (ConfigError, DataError, ArtifactError, PrerequisiteError, StoppedOnRequest)
}


def error_of(exit_code: object) -> type[SftError]:
    """Return the error that a process which ended with `exit_code` stands for."""
    return _ERRORS.get(exit_code, SftError)


def last_change(run: RunDir) -> int | None:
    """Return when status.json changed: what tells the outcome of this start from that of an earlier
    one."""
    return run.status.stat().st_mtime_ns if run.status.exists() else None


def status_since(run: RunDir, before: int | None) -> dict[str, Any] | None:
    """Return status.json if the ranks wrote it since `before`, a value of `last_change`."""
    return read_status(run) if last_change(run) != before else None


def raise_unless_complete(
    prepared: Prepared, *, exit_code: int, before: int | None, said: str
) -> None:
    """Raise the SftError that the ranks left in status.json since `before`, or one that says
    `said`.

    `exit_code`: of what started the ranks, that of the first of them to fail. One that another
    start's status contradicts tells of ranks that were refused the run: they have said so.
    """
    status = status_since(prepared.run, before)
    if exit_code in _ERRORS and (status is None or status.get("exit_code") != exit_code):
        raise error_of(exit_code)(said)
    if exit_code == 0 and (status is None or status.get("exit_code") == 0):
        return
    if status is None or status.get("exit_code") is None:  # they were killed
        prepared.shard_set.check_unchanged()
        raise SftError(said)
    raise error_of(status["exit_code"])(status["message"])


def read_outcome(
    run: RunDir, *, changed_after: Path | None = None, wait_seconds: float = 0.0
) -> tuple[int, str]:
    """Return the exit code of a run that has ended, and a line that says how it stands.

    With `changed_after`, a status older than that file tells of an earlier start: this one ended
    without a word, code 1. The last word of a rank on another node may take a while to be seen here
    through a network file system: `wait_seconds` is how long to look again. Raises ArtifactError
    where there is no run.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        status = read_status(run)
        stale = (
            changed_after is not None
            and status is not None
            and _is_older(run.status, changed_after)
        )
        if status is not None and status.get("state") == "complete":
            return 0, f"{run.path} is complete: {status['message']}"
        if status is not None and not stale and isinstance(status.get("exit_code"), int):
            return status["exit_code"], f"{run.path} has {status['state']}: {status['message']}"
        if time.monotonic() >= deadline:
            break
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if status is None:
        raise ArtifactError(f"{run.path} has no status.json: no run was started there")
    if stale:
        return (
            1,
            (
                f"{run.path} ended before its ranks began; their logs say why. Before that:"
                f" {status['state']}"
            ),
        )
    return 1, f"{run.path} is running, or was killed: its ranks have not said how they ended"


def _is_older(path: Path, mark: Path) -> bool:
    return path.stat().st_mtime_ns < mark.stat().st_mtime_ns
