"""Checkpoints on the hub: each on a branch RUN-step-N, with the files that it has on disk.

A run can resume from one that was fetched into its `checkpoints` as step-N, if --trust-checkpoint
is given, since it holds pickles.
"""

from pathlib import Path

from shared.errors import IncompleteArtifactError
from train.publish.hub import Content, sync
from train.run.checkpoint_layout import STATE_NAME, list_checkpoints, read_state_file, recovery_hint
from train.run.directory import RunDir


def push_checkpoint(path: Path, repo: str) -> str:
    """Push the committed checkpoint at `path` to its branch; return its address.

    Raises IncompleteArtifactError, ArtifactError or ChecksumError for a damaged one, and what
    `sync` raises.
    """
    path = path.resolve()  # `best` is a link, which training may move meanwhile
    entries = read_state_file(path)["files"]
    for name, entry in entries.items():
        if not (path / name).is_file() or (path / name).stat().st_size != entry["bytes"]:
            raise IncompleteArtifactError(
                f"{path / name} is missing or not of {entry['bytes']} bytes{recovery_hint(path)}"
            )
    # read once: training may write an evaluation loss into it meanwhile
    state = (path / STATE_NAME).read_bytes()
    files: dict[str, Content] = {STATE_NAME: state, **{name: path / name for name in entries}}
    run_name = path.parent.parent.name
    return sync(
        repo,
        files,
        source=path,
        message=f"{run_name}: {path.name}",
        is_ours=lambda name: name != ".gitattributes",
        branch=f"{run_name}-{path.name}",
        digests={name: entry["sha256"] for name, entry in entries.items()},
    )


def push_checkpoints(run: RunDir, repo: str) -> list[str]:
    """Push every committed checkpoint of `run`, newest first; return their addresses. Raises as
    `push_checkpoint`."""
    committed = list_checkpoints(run.checkpoints)
    if not committed:
        raise IncompleteArtifactError(f"{run.path} has no checkpoint")
    return [push_checkpoint(path, repo) for path in reversed(committed)]
