"""The run directory: its files, the description of the run in config.json, and status.json.

runs/NAME/
  config.json     the resolved recipe, the shard set, versions: what a resume must agree with
  status.json     the state and the exit code of the run, for launchers and requeue scripts
  metrics.jsonl   one object per logged step
  spikes.jsonl    one object per step whose loss spiked; written only if one did
  stacks/         the stacks of each rank when the run hung; written only if it did
  STOP            made by a user to stop the run after a save; removed after the stop
  checkpoints/    step-00000500/ ...
  model/          the trained model in Hugging Face format
  model-old-N/    files in model/ that the run did not write, moved here by an export
  loss.png
"""

import contextlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from shared import atomic, config
from shared.errors import ArtifactError, ConfigError, FingerprintMismatchError
from shared.shard_reader import ShardSet
from train.config import TrainConfig
from train.data.step_order import StepOrder

State = Literal["running", "complete", "stopped", "failed"]

# Any of these makes a directory one of a run, whatever else lies in it.
_OF_A_RUN = {".lock", "config.json", "status.json", "metrics.jsonl", "checkpoints", "model", "STOP"}
# The scripts that start a run, and what a scheduler writes beside it.
_ALLOWED = (".out", ".err", ".log", ".sh")
_VERSIONED = ("torch", "transformers", "deepspeed", "liger-kernel", "numpy", "sft-shards")


@dataclass(frozen=True, slots=True)
class RunDir:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def spikes(self) -> Path:
        return self.path / "spikes.jsonl"

    @property
    def stop(self) -> Path:
        return self.path / "STOP"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"


def identity(recipe: TrainConfig, shard_set: ShardSet, order: StepOrder) -> dict[str, Any]:
    """Return what must not change within a run: everything that the weights after a step depend on.

    Left out on purpose: logging, checkpoint frequency, number of ranks, packs per micro-batch,
    attention kernel, gradient checkpointing and ZeRO stage, which change speed and memory only; and
    what to do when a step fails or hangs, so that a run that failed can resume with another answer.
    """
    plain = config.to_plain(recipe)
    return {
        "shards": shard_set.manifest.fingerprint,
        "model": {
            key: plain["model"][key] for key in ("name", "revision", "config", "resize_vocab")
        },
        "optim": plain["optim"],
        "schedule": plain["schedule"],
        "loss": plain["loss"],
        "lora": {key: value for key, value in plain["lora"].items() if key != "export"},
        "run": {"seed": recipe.run.seed},
        "engine": {
            key: plain["engine"][key]
            for key in ("dtype", "quantized_weights", "quantized_gradients")
        },
        f"{order.unit}s_per_step": order.units_per_step,
        "total_steps": order.total_steps,
    }


def describe(
    recipe: TrainConfig, shard_set: ShardSet, order: StepOrder, *, world_size: int
) -> dict[str, Any]:
    """Return the content of config.json for a new run."""
    manifest = shard_set.manifest
    versions: dict[str, str | None] = dict.fromkeys(_VERSIONED)
    for name in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "recipe": config.to_plain(recipe),
        "shards": {
            "path": str(shard_set.path.resolve()),
            "name": manifest.name,
            "fingerprint": manifest.fingerprint,
        },
        "identity": identity(recipe, shard_set, order),
        "world_size": world_size,
        "wandb_id": secrets.token_hex(8),
        "versions": versions,
    }


def check_output(run: RunDir) -> None:
    """Raise ArtifactError unless `run` may be a run directory: free, empty or a run's already.

    It may not lie at or below a file, nor hold files that no run has written.
    """
    try:
        # The directory itself may be new: then its nearest parent that exists decides.
        nearest = next(path for path in (run.path, *run.path.parents) if path.exists())
        names = {path.name for path in run.path.iterdir()} if run.path.is_dir() else set()
    except OSError as exc:
        raise ArtifactError(f"--output {run.path}: {exc}; name another directory") from exc
    if not nearest.is_dir():
        raise ArtifactError(
            f"--output {run.path}: {nearest} is a file; expected a directory, or a name that is"
            " free"
        )
    foreign = {
        name
        for name in names
        if not name.startswith(".") and name != "logs" and not name.endswith(_ALLOWED)
    }
    if foreign and not names & _OF_A_RUN:
        raise ArtifactError(
            f"--output {run.path} holds {min(foreign)} and no run; expected an empty directory, a"
            " run, or a name that is free"
        )


def read_description(run: RunDir) -> dict[str, Any] | None:
    """Return config.json, or None if there is no run yet. Raises ArtifactError if it is damaged."""
    data = _read_json(run.config)
    if data is not None and not (
        isinstance(data.get("identity"), dict) and isinstance(data.get("wandb_id"), str)
    ):
        raise ArtifactError(f"{run.config} does not describe a run; use another --output")
    return data


def check_identity(old: Mapping[str, Any], new: Mapping[str, Any], where: Path) -> None:
    """Check that a resume keeps to the shards and the recipe that the run began with.

    Raises FingerprintMismatchError for other shards, ConfigError for another recipe.
    """
    if old.get("shards") != new["shards"]:
        raise FingerprintMismatchError(
            f"{where} was trained on shards with fingerprint {str(old.get('shards'))[:16]}...,"
            f" --shards has {new['shards'][:16]}...; name the shards of the run, or start another"
            " run with --output"
        )
    # One difference is reported by name, the others are counted: they often have one cause.
    changed = config.differences(old, new)
    if changed:
        key, before, after = changed[0]
        more = f" ({len(changed) - 1} more differ)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{where} was begun with {key} = {json.dumps(before)}, now it is"
            f" {json.dumps(after)}{more}; put it back to resume that run, or start another run with"
            " --output"
        )


def write_status(run: RunDir, state: State, *, exit_code: int | None, message: str) -> None:
    """Write status.json; `exit_code` is None while the run goes on."""
    atomic.write_json(run.status, {"state": state, "exit_code": exit_code, "message": message})


def read_status(run: RunDir) -> dict[str, Any] | None:
    """Return status.json, or None if there is none."""
    return _read_json(run.status)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as exc:
        raise ArtifactError(
            f"cannot read {path}: {exc}; remove it or use another --output"
        ) from exc
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds no JSON object; remove it or use another --output")
    return data
