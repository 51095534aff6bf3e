"""Checkpoints on the hub, each on a branch of its name, pushed while training goes on: it never waits for the hub.

A branch holds a checkpoint as it lies on disk: fetched into the `checkpoints` of a run directory it can be gone on
from. A process of its own pushes, one checkpoint at a time, so that a stop need not wait for it. A push that fails is
said and stops no step; what is missing is pushed when the run ends.
"""

import contextlib
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

from train.checkpoint_files import STATE_NAME, list_checkpoints, read_state_file
from train.launch import console_script
from train.push import Content, sync
from train.run_dir import RunDir

logger = logging.getLogger(__name__)


def push_checkpoint(path: Path, repo: str) -> str:
    """Push the committed checkpoint at `path` to the branch of its name; return its address.

    Raises IncompleteArtifactError or ArtifactError for a damaged one, and what `sync` raises: its large files must
    arrive with the digests that they were committed with.
    """
    entries = read_state_file(path)["files"]
    state = (path / STATE_NAME).read_bytes()  # as it is now: an evaluation loss may be written into it meanwhile
    files: dict[str, Content] = {STATE_NAME: state, **{name: path / name for name in entries}}
    return sync(
        repo,
        files,
        source=path,
        message=f"{path.resolve().parent.parent.name}: {path.name}",
        is_ours=lambda name: name != ".gitattributes",
        branch=path.name,
        digests={name: entry["sha256"] for name, entry in entries.items()},
    )


def push_checkpoints(run: RunDir, repo: str) -> list[str]:
    """Push every committed checkpoint of `run`, newest first; return their addresses. Raises as `push_checkpoint`."""
    return [push_checkpoint(path, repo) for path in reversed(list_checkpoints(run.checkpoints))]


class CheckpointPusher:
    """Rank 0's: starts `sft-train push` for a checkpoint, unless one is being pushed."""

    def __init__(self, repo: str) -> None:
        self.repo = repo
        self._path: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def push(self, path: Path) -> None:
        """Have the checkpoint at `path` pushed."""
        busy_with = self.busy_with()
        if busy_with is not None:
            logger.warning("%s is not pushed yet: %s still is. It is, when the run ends", path.name, busy_with.name)
            return
        logger.info("pushing %s to %s", path, self.repo)
        self._path = path
        self._process = subprocess.Popen(
            [console_script(), "push", path.absolute(), self.repo], stdout=subprocess.DEVNULL
        )

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
            logger.warning("%s was not pushed (see above); training goes on, and it is when the run ends", self._path)
        self._process = None
        return None

    def wait(self) -> None:
        """Wait for the push that is going on, if any."""
        if self._process is not None:
            self._process.wait()
            self.busy_with()

    def stop(self) -> None:
        """End the push that is going on, if any; the hub keeps the files that it has whole."""
        if self.busy_with() is not None and self._process is not None:
            self._process.kill()
            self._process.wait()
            logger.warning("the push of %s is cut short; the same command goes on with it", self._path)


@contextlib.contextmanager
def pushing(repo: str | None) -> Iterator[CheckpointPusher | None]:
    """Give rank 0 its pusher, if a repository is named; end its push if the block fails."""
    pusher = None if repo is None else CheckpointPusher(repo)
    try:
        yield pusher
    except BaseException:
        if pusher is not None:
            pusher.stop()
        raise
