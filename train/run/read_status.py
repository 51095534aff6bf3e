"""How a run ended, read from status.json.

torchrun's exit code does not tell: it turns every failure into 1, and a stop on request into 0.
"""

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
    """Return the class of error that ends a process with `exit_code`."""
    return _ERRORS.get(exit_code, SftError)


def last_change(run: RunDir) -> int | None:
    """Return when status.json was last written: it tells a new status from an earlier one."""
    return run.status.stat().st_mtime_ns if run.status.exists() else None


def status_since(run: RunDir, before: int | None) -> dict[str, Any] | None:
    """Return status.json if the ranks wrote it since `before`, a value of `last_change`."""
    return read_status(run) if last_change(run) != before else None


def raise_unless_complete(
    prepared: Prepared, *, exit_code: int, before: int | None, message: str
) -> None:
    """Raise the SftError that the ranks left in status.json since `before`, or one with `message`.

    `exit_code` is that of the process that started the ranks: of the first rank that failed.
    """
    status = status_since(prepared.run, before)
    if exit_code in _ERRORS and (status is None or status.get("exit_code") != exit_code):
        # Another start holds the run: status.json is about that one, and these ranks were refused.
        raise error_of(exit_code)(message)
    if exit_code == 0 and (status is None or status.get("exit_code") == 0):
        return
    if status is None or status.get("exit_code") is None:
        # The ranks were killed, perhaps by SIGBUS: a shard file that was cut short explains that.
        prepared.shard_set.check_unchanged()
        raise SftError(message)
    raise error_of(status["exit_code"])(status["message"])


def read_outcome(
    run: RunDir, *, changed_after: Path | None = None, wait_seconds: float = 0.0
) -> tuple[int, str]:
    """Return the exit code of a run that has ended, and a line for people.

    A status older than the file `changed_after` is that of an earlier start: this one ended without
    writing any, exit code 1. What a rank on another node wrote may take a while to show up here
    through a network file system: `wait_seconds` is how long to look again. Raises ArtifactError
    if there is no run.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        status = read_status(run)
        stale = (
            changed_after is not None
            and status is not None
            and run.status.stat().st_mtime_ns < changed_after.stat().st_mtime_ns
        )
        # Also where the status is an old one: this start found nothing left to do.
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
        return 1, (
            f"{run.path} ended before its ranks began; their logs hold the reason. Before that:"
            f" {status['state']}"
        )
    return 1, f"{run.path} is running, or was killed: its ranks have not recorded how they ended"
