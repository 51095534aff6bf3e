"""Write into status.json how a run ends, even if the disk is full."""

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
    """Record how the block ends, if it fails.

    The first rank to fail records the reason; the others only notice that it is gone.
    """
    try:
        yield
    except BaseException as exc:
        known = unwritable(exc) or exc if isinstance(exc, OSError) else exc
        state: State = "stopped" if isinstance(known, StoppedOnRequest) else "failed"
        code = known.exit_code if isinstance(known, SftError) else 1
        message = " ".join(str(known).split()) or type(known).__name__
        # An error of the connection to another rank: the cause lies there.
        if "gloo/transport" in message or isinstance(known, torch.distributed.DistError):
            message = (
                "another rank is gone (killed, or out of memory?); run the same command again to"
                f" resume from the last checkpoint. {message}"
            )
        record_end(run, state, exit_code=code, message=message)
        raise


def record_end(run: RunDir, state: State, *, exit_code: int, message: str) -> None:
    """Write the status, unless another rank has recorded the end by now."""
    status = read_status(run)
    if status is None or status.get("state") != "running":
        return
    try:
        write_status(run, state, exit_code=exit_code, message=message)
    except OSError as exc:
        # What went wrong first matters more than an error here.
        with contextlib.suppress(OSError):
            if is_full(exc):
                _empty_unfinished_saves(run)
            write_status(run, state, exit_code=exit_code, message=message)


def _empty_unfinished_saves(run: RunDir) -> None:
    """Make room on a full disk: an unfinished checkpoint is worth nothing.

    The files are cut, not removed: a removed file keeps its room for as long as a rank has it open.
    """
    for staged in run.checkpoints.glob(f".tmp-{PREFIX}*"):
        for file in staged.rglob("*"):
            if file.is_file() and not file.is_symlink():
                os.truncate(file, 0)
