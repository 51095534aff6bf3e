"""Write how a run ends into its status.json, also where the disk is full."""

import contextlib
import os
from collections.abc import Iterator

import torch

from shared.disk import is_full, unwritable
from shared.errors import SftError, StoppedOnRequest
from train.run.checkpoint_layout import PREFIX
from train.run.directory import RunDir, State, read_status, write_status


@contextlib.contextmanager
def recorded_end(run: RunDir) -> Iterator[None]:
    """Record how the block ends. The first rank to fail says why: what others then see is only its
    absence."""
    try:
        yield
    except BaseException as exc:
        known = unwritable(exc) or exc if isinstance(exc, OSError) else exc
        state: State = "stopped" if isinstance(known, StoppedOnRequest) else "failed"
        code = known.exit_code if isinstance(known, SftError) else 1
        record_end(run, state, exit_code=code, message=_in_words(known))
        raise


def _in_words(exc: BaseException) -> str:
    text = " ".join(str(exc).split()) or type(exc).__name__
    if "gloo/transport" in text or isinstance(exc, torch.distributed.DistError):
        return (
            "another rank is gone (killed, or out of memory?); the same command goes on from the"
            f" last save. {text}"
        )
    return text


def record_end(run: RunDir, state: State, *, exit_code: int, message: str) -> None:
    """Write the status, unless another rank has said by now why the run ended."""
    status = read_status(run)
    if status is None or status.get("state") != "running":
        return
    try:
        write_status(run, state, exit_code=exit_code, message=message)
    except OSError as exc:
        with contextlib.suppress(OSError):  # what went wrong first matters more
            if is_full(exc):
                _empty_unfinished_saves(run)
            write_status(run, state, exit_code=exit_code, message=message)


def _empty_unfinished_saves(run: RunDir) -> None:
    """Make room: what they hold is worthless. Removed, a file would keep its room for as long as it
    is open."""
    for staged in run.checkpoints.glob(f".tmp-{PREFIX}*"):
        for file in staged.rglob("*"):
            if file.is_file() and not file.is_symlink():
                os.truncate(file, 0)
