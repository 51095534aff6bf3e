"""Save and load checkpoints; train/run/checkpoint_layout.py describes their files. The newest
complete one is never removed.

All ranks write into `.tmp-step-...`; after a barrier each hashes and flushes a share of the files,
and rank 0 writes state.json and renames. DeepSpeed's files are pickles: they are read only from the
directory of the run, and only after their digests match.
"""

import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from shared import atomic
from shared.errors import ArtifactError, SftError
from shared.hashing import seed_from, sha256_file
from train.checkpoint.reshard import convert, load_converted
from train.engine.engine import has_frozen_weights, trained_parameters
from train.engine.process_group import Ranks, barrier, broadcast_from_main, gather_to_main
from train.run.checkpoint_layout import (
    BEST_NAME,
    ENGINE_DIR,
    ENGINE_TAG,
    FORMAT_VERSION,
    MODEL_DIR,
    PREFIX,
    RUN_NAME,
    STATE_NAME,
    SUPERSEDED_NAME,
    best_checkpoint,
    check_digest,
    list_checkpoints,
    read_state_file,
    recovery_hint,
    same_layout,
)
from train.run.directory import RunDir
from train.run.train_state import Counters, TrainState, WindowSums

logger = logging.getLogger(__name__)

T = TypeVar("T")


def save_checkpoint(
    engine: Any,
    state: TrainState,
    *,
    run: RunDir,
    ranks: Ranks,
    identity: dict[str, Any],
    keep_last: int,
    in_use: Path | None = None,
) -> Path:
    """Save a checkpoint of all ranks, remove old ones (see `remove_older`) and return its path."""
    final = run.checkpoints / f"{PREFIX}{state.step:08d}"
    staging = run.checkpoints / f".tmp-{final.name}"
    if ranks.is_main:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "rng").mkdir(parents=True)
    # No rank writes before the directory exists.
    barrier(ranks)
    # Frozen weights are left out: they are read again from the base model.
    engine.save_checkpoint(
        str(staging / ENGINE_DIR),
        tag=ENGINE_TAG,
        save_latest=False,
        exclude_frozen_parameters=has_frozen_weights(engine),
    )
    # Dropout draws from the generator of the device.
    generators = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(ranks.device)
    save_file(generators, _rng_file(staging, ranks))
    if ranks.is_main:
        shutil.copyfile(run.config, staging / RUN_NAME)
        engine.module.model.config.save_pretrained(staging / MODEL_DIR)
    # No rank hashes a file before it is complete.
    barrier(ranks)
    files = _hash_together(staging, ranks)
    if ranks.is_main:
        # state.json is the last file, and the rename completes the checkpoint.
        content = {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "counters": asdict(state.counters),
            "window": None if state.window is None else asdict(state.window),
            "eval_loss": state.eval_loss,
            "identity": identity,
            "world_size": ranks.world_size,
            "zero_stage": engine.zero_optimization_stage(),
            "files": files,
        }
        atomic.write_json(staging / STATE_NAME, content)
        for folder, _, _ in os.walk(staging, topdown=False):
            atomic.fsync_dir(Path(folder))
        atomic.replace_dir(staging, final)
        remove_older(run, keep_last=keep_last, in_use=in_use)
    # No rank trains on before the checkpoint is complete.
    barrier(ranks)
    return final


def remove_older(run: RunDir, *, keep_last: int, in_use: Path | None = None) -> None:
    """Remove all checkpoints but the newest `keep_last`, the best one and the one `in_use`."""
    best = best_checkpoint(run.checkpoints)
    for old in list_checkpoints(run.checkpoints)[:-keep_last]:
        if old in (best, in_use):
            continue
        # Renamed first, so that a crash half-way leaves no directory that looks complete.
        doomed = old.with_name(f".tmp-{old.name}-old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(old, doomed)
        shutil.rmtree(doomed)


def record_eval_loss(path: Path, loss: float) -> None:
    """Write the evaluation loss of a complete checkpoint into its state.json, and link the best
    one."""
    data = read_state_file(path)
    atomic.write_json(path / STATE_NAME, {**data, "eval_loss": loss})
    _link_best(path.parent)


def load_checkpoint(engine: Any, path: Path, *, run: RunDir, ranks: Ranks, seed: int) -> TrainState:
    """Check every file of the checkpoint at `path`, then load its state into `engine` and the
    random generators.

    With the same number of ranks and the same ZeRO stage the state is restored bit for bit.
    Otherwise weights and optimizer state are, and the generators start from (`seed`, rank, step).
    Raises ChecksumError, IncompleteArtifactError or ArtifactError, the same on every rank, before
    anything is loaded.
    """
    data = read_state_file(path)
    # Every rank checks a share of the files. The first error is raised on all ranks, since one that
    # raised alone would leave the others waiting.
    problem: ArtifactError | None = None
    try:
        for name in _share(sorted(data["files"]), ranks):
            check_digest(path, name, data["files"][name])
    except ArtifactError as exc:
        problem = exc
    problems = [error for error in gather_to_main(problem, ranks) if error is not None]
    first = broadcast_from_main(problems[0] if problems else None, ranks)
    if isinstance(first, ArtifactError):
        raise first
    if same_layout(data, world_size=ranks.world_size, zero_stage=engine.zero_optimization_stage()):
        loaded, _ = engine.load_checkpoint(
            str(path / ENGINE_DIR),
            tag=ENGINE_TAG,
            load_lr_scheduler_states=False,
            load_module_strict=not has_frozen_weights(engine),
        )
        if loaded is None:
            raise ArtifactError(
                f"DeepSpeed found no state in {path / ENGINE_DIR}{recovery_hint(path)}"
            )
        generators = load_file(_rng_file(path, ranks))
        torch.set_rng_state(generators["cpu"])
        if ranks.device.type == "cuda" and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], ranks.device)
    else:
        _load_converted(engine, path, data, run=run, ranks=ranks)
        torch.manual_seed(seed_from("dropout", seed, ranks.rank, data["step"]))
    return TrainState(
        step=data["step"],
        counters=Counters(**data["counters"]),
        window=WindowSums(**data["window"]),
        eval_loss=data["eval_loss"],
    )


def set_aside_newer(run: RunDir, path: Path) -> None:
    """Move the checkpoints of `run` that are newer than `path` into `superseded`, since the run now
    resumes from `path`.

    Otherwise the next call would resume from them, and the best one could be from steps that are
    no longer part of the run.
    """
    newer = [other for other in list_checkpoints(run.checkpoints) if other.name > path.name]
    if not newer or path.parent.resolve() != run.checkpoints.resolve():
        return
    folder = run.checkpoints / SUPERSEDED_NAME
    folder.mkdir(exist_ok=True)
    for other in newer:
        shutil.rmtree(folder / other.name, ignore_errors=True)
        os.rename(other, folder / other.name)
    logger.warning(
        "moved %s to %s: the run resumes from %s",
        ", ".join(p.name for p in newer),
        folder,
        path.name,
    )
    _link_best(run.checkpoints)


def _link_best(folder: Path) -> None:
    best, link = best_checkpoint(folder), folder / BEST_NAME
    if best is None:
        link.unlink(missing_ok=True)
        return
    # A new link replaces the old one by a rename, so that there is one at any time.
    staging = folder / f".tmp-{BEST_NAME}"
    staging.unlink(missing_ok=True)
    staging.symlink_to(best.name)
    os.replace(staging, link)


def _load_converted(
    engine: Any, path: Path, data: dict[str, Any], *, run: RunDir, ranks: Ranks
) -> None:
    """Convert the checkpoint on rank 0, and load the result on all.

    The next start of the run removes what a killed conversion leaves.
    """
    converted = run.checkpoints / f".tmp-universal-{path.name}"
    parameters = trained_parameters(engine.module)
    problem: SftError | None = None
    if ranks.is_main:
        logger.info(
            "converting %s from %d ranks with ZeRO stage %d to %d ranks with stage %d",
            path,
            data["world_size"],
            data["zero_stage"],
            ranks.world_size,
            engine.zero_optimization_stage(),
        )
        shutil.rmtree(converted, ignore_errors=True)
        try:
            convert(path, converted, zero_stage=data["zero_stage"], parameters=parameters)
        except SftError as exc:
            problem = exc
    shared_problem = broadcast_from_main(problem, ranks)
    if isinstance(shared_problem, SftError):
        raise shared_problem
    load_converted(engine, converted, parameters=parameters)
    barrier(ranks)
    if ranks.is_main:
        shutil.rmtree(converted)


def _hash_together(staging: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Hash and flush every file, a share per rank; rank 0 gets all digests."""
    digests: dict[str, dict[str, Any]] = {}
    for file in _share(sorted(path for path in staging.rglob("*") if path.is_file()), ranks):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        digests[file.relative_to(staging).as_posix()] = {
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
        }
    merged: dict[str, dict[str, Any]] = {}
    for share in gather_to_main(digests, ranks):
        assert isinstance(share, dict)
        merged.update(share)
    return merged


def _share(items: list[T], ranks: Ranks) -> list[T]:
    return items[ranks.rank :: ranks.world_size]


def _rng_file(checkpoint: Path, ranks: Ranks) -> Path:
    return checkpoint / "rng" / f"rank-{ranks.rank:05d}.safetensors"
