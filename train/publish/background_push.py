"""Pushes to the hub during training and after it, each in its own process: neither a step nor a
stop waits for the hub.

While the run trains, a push that fails is logged and stops nothing. After the last step the missing
pushes follow, and all ranks wait: a launcher could take the end of one rank for the end of all.
"""

import contextlib
import logging
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from shared.errors import SftError, StoppedOnRequest
from train.engine.process_group import Ranks, any_rank, broadcast_from_main
from train.run.command_line import console_script
from train.run.directory import RunDir
from train.run.prepare import TrainRequest
from train.run.read_status import error_of
from train.run.stop_request import StopRequest

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.5
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


class Pusher:
    """Run one `sft-train push` at a time, on rank 0."""

    def __init__(
        self, run: RunDir, *, checkpoints: str | None, model: str | None, quiet: bool
    ) -> None:
        """`checkpoints`, `model`: the repositories to push them to, if any."""
        self._checkpoints, self._quiet = checkpoints, quiet
        self._at_the_end: list[list[str]] = []
        if checkpoints is not None:
            self._at_the_end.append(["--checkpoints", str(run.path), checkpoints])
        if model is not None:
            self._at_the_end.append([str(run.path), model])
        self._path: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def push(self, path: Path) -> None:
        """Start to push the checkpoint at `path`, unless another is being pushed."""
        if self._checkpoints is None:
            return
        busy_with = self.busy_with()
        if busy_with is not None:
            logger.warning(
                "%s is not pushed yet, for %s still is being pushed; if it still exists when the"
                " run ends, it is pushed then",
                path.name,
                busy_with.name,
            )
            return
        try:
            self._process = _start([str(path), self._checkpoints], quiet=self._quiet)
        except OSError as exc:
            logger.warning("%s is not pushed yet: no process could be started (%s)", path.name, exc)
            return
        self._path = path
        logger.info("pushing %s to %s", path.name, self._checkpoints)

    def busy_with(self) -> Path | None:
        """Return the checkpoint that is being pushed, if any: it must stay."""
        if self._process is None:
            return None
        code = self._process.poll()
        if code is None:
            return self._path
        assert self._path is not None
        if code == 0:
            logger.info("%s is on the hub", self._path.name)
        else:
            logger.warning(
                "%s was not pushed (see above); training goes on. If it still exists when the run"
                " ends, it is pushed then",
                self._path.name,
            )
        self._process = None
        return None

    def finish_next(self) -> bool:
        """After the last step, start the next of the missing pushes, one at a time; return whether
        all are done.

        Raises the SftError that a push ended with.
        """
        if self._process is not None and self._process.poll() is None:
            return False
        if self._path is not None:
            self.busy_with()  # if that one failed, the pushes at the end include it
            self._path = None
        elif self._process is not None:
            words = self._at_the_end.pop(0)
            code, self._process = self._process.returncode, None
            if code:
                raise error_of(code)(
                    f"the run has trained, but `sft-train push {' '.join(words)}` failed (see"
                    " above); run the same command again, or that one"
                )
        if not self._at_the_end:
            return True
        self._process = _start(self._at_the_end[0], quiet=self._quiet)
        return False

    def stop(self) -> None:
        """Kill the current push, if any; the hub keeps the files that have arrived whole."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            logger.warning("a push is cut short; the same command resumes it")


@contextlib.contextmanager
def pushing(request: TrainRequest, run: RunDir, ranks: Ranks) -> Iterator[Pusher | None]:
    """Yield rank 0 its pusher; kill its push if the block fails."""
    if not ranks.is_main:
        yield None
        return
    pusher = Pusher(
        run,
        checkpoints=request.push_checkpoints,
        model=request.push_to_hub,
        quiet=request.verbosity < 0,
    )
    try:
        yield pusher
    except BaseException:
        pusher.stop()
        raise


def push_the_rest(pusher: Pusher | None, ranks: Ranks, stop_request: StopRequest) -> None:
    """Push what is missing, while all ranks wait. Raises the SftError of a push that failed, and
    StoppedOnRequest."""
    while True:
        answer: object = True
        if pusher is not None:
            try:
                answer = pusher.finish_next()
            except SftError as exc:
                answer = exc
        # rank 0 alone has a pusher; the others learn its answer, so that all ranks end alike
        answer = broadcast_from_main(answer, ranks)
        if isinstance(answer, SftError):
            raise answer
        if answer:
            return
        if any_rank(stop_request.is_set(), ranks):
            stop_request.clear()
            raise StoppedOnRequest(
                "stopped while pushing, all steps done; run the same command again to resume"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _start(words: list[str], *, quiet: bool) -> "subprocess.Popen[bytes]":
    """Start a push that signals to this process, or to its group, do not reach; it dies with this
    process."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # they would cut through the lines of the log
    command = [str(console_script()), "push", "--die-with-parent", *["-q"] * quiet, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, process_group=0)
