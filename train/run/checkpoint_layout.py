"""The files of a checkpoint, found and checked without torch or DeepSpeed.

    checkpoints/step-00000500/
      state.json            step, counters, identity of the run, number of ranks, evaluation loss or
                            null, size and sha256 of every other file
      run.json              a copy of the run's config.json: an export needs no other directory
      model/config.json     the transformers config of the model
      engine/state/*.pt     DeepSpeed's state, one share per rank
      rng/rank-00000.safetensors

A directory named step-N is whole, because it was renamed into place. `best` is a symbolic link to
the checkpoint with the lowest evaluation loss, which stays when others are removed.
"""

import json
from pathlib import Path
from typing import Any

from shared.errors import ArtifactError, ChecksumError, IncompleteArtifactError
from shared.hashing import sha256_file

BEST_NAME = "best"
SUPERSEDED_NAME = "superseded"
FORMAT_VERSION = 2
STATE_NAME = "state.json"
RUN_NAME = "run.json"
MODEL_DIR = "model"
ENGINE_DIR = "engine"
ENGINE_TAG = "state"
PREFIX = "step-"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints in `folder`, oldest first."""
    return sorted(
        path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()
    )


def best_checkpoint(folder: Path) -> Path | None:
    """Return the committed checkpoint in `folder` with the lowest evaluation loss, if any.

    Of two with the same loss, the older one.
    """
    losses: list[tuple[float, Path]] = []
    for path in list_checkpoints(folder):
        try:
            loss = read_state_file(path)["eval_loss"]
        except ArtifactError:
            # A damaged checkpoint is not the best one. Loading it reports the damage.
            continue
        if loss is not None:
            losses.append((loss, path))
    return min(losses)[1] if losses else None


def read_state_file(path: Path) -> dict[str, Any]:
    """Return state.json of the checkpoint at `path`.

    Raises IncompleteArtifactError or ArtifactError.
    """
    file = path / STATE_NAME
    try:
        data = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise IncompleteArtifactError(_not_a_checkpoint(path)) from exc
    except ValueError as exc:
        raise ArtifactError(f"{file} is not valid JSON ({exc}){recovery_hint(path)}") from exc
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        seen = data.get("format_version") if isinstance(data, dict) else None
        raise ArtifactError(
            f"{file}: format_version is {seen!r}; this program reads"
            f" {FORMAT_VERSION}{recovery_hint(path)}"
        )
    return data


def same_layout(state: dict[str, Any], *, world_size: int, zero_stage: int) -> bool:
    """Return whether each rank can read back what one rank wrote, for this state.json."""
    return bool(state["world_size"] == world_size and state["zero_stage"] == zero_stage)


def check_digest(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Check file `name` of the checkpoint at `path` against its entry in state.json.

    Raises IncompleteArtifactError or ChecksumError.
    """
    file = path / name
    try:
        size = file.stat().st_size
    except FileNotFoundError as exc:
        raise IncompleteArtifactError(f"{file} is missing{recovery_hint(path)}") from exc
    # The size first: it tells a file that was cut short without hashing what may be gigabytes.
    if size != entry["bytes"]:
        raise IncompleteArtifactError(
            f"{file} has {size} bytes; {STATE_NAME} expects {entry['bytes']}{recovery_hint(path)}"
        )
    if sha256_file(file) != entry["sha256"]:
        raise ChecksumError(
            f"{file}: its bytes have changed since it was written{recovery_hint(path)}"
        )


def _not_a_checkpoint(path: Path) -> str:
    """Return why `path` is none, and which checkpoint the user may have meant."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path.parent
    checkpoints = list_checkpoints(folder)
    example = f", such as {checkpoints[-1]}" if checkpoints else ": RUN/checkpoints/step-N"
    remedy = f"; give a checkpoint{example}"
    if path.name.removeprefix(PREFIX).isdigit() and path.is_dir():
        return f"{path} is not a whole checkpoint: it has no {STATE_NAME}{recovery_hint(path)}"
    if folder == path / "checkpoints":
        return f"{path} is a run{remedy}"
    if path.name == BEST_NAME and checkpoints:
        return f"{path} does not exist: no checkpoint of this run was evaluated{remedy}"
    return f"{path} {'is no checkpoint' if path.exists() else 'does not exist'}{remedy}"


def recovery_hint(path: Path) -> str:
    """Return what to do about a checkpoint that cannot be used: resume from the one before it."""
    older = [other for other in list_checkpoints(path.parent) if other.name < path.name]
    if older:
        return f"; resume from the one before it with --resume {older[-1]}"
    return f"; remove {path} to start again"
