"""Save and load checkpoints (their layout: checkpoint_files.py); never is the newest complete one
removed.

All ranks write into `.tmp-step-...`; after a barrier each hashes and flushes a share of the files,
and rank 0 writes state.json and renames. DeepSpeed's files are pickles: they are read only from the
run's own directory, and only after their digests match.
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
    """Commit a checkpoint of all ranks, then remove those older than the newest `keep_last`; return
    its path.

    The best one stays, and the one that is `in_use`.
    """
    final = run.checkpoints / f"{PREFIX}{state.step:08d}"
    staged = run.checkpoints / f".tmp-{final.name}"
    if ranks.is_main:
        shutil.rmtree(staged, ignore_errors=True)
        (staged / "rng").mkdir(parents=True)
    barrier(ranks)
    engine.save_checkpoint(
        str(staged / ENGINE_DIR),
        tag=ENGINE_TAG,
        save_latest=False,
        exclude_frozen_parameters=has_frozen_weights(
            engine
        ),  # those of a base model are read from it again
    )
    save_file(_rng_state(ranks.device), staged / "rng" / f"rank-{ranks.rank:05d}.safetensors")
    if ranks.is_main:
        shutil.copyfile(run.config, staged / RUN_NAME)
        engine.module.model.config.save_pretrained(staged / MODEL_DIR)
    barrier(ranks)
    files = _hash_together(staged, ranks)
    if ranks.is_main:
        stage = engine.zero_optimization_stage()
        _commit(staged, final, state, identity=identity, ranks=ranks, zero_stage=stage, files=files)
        remove_older(run, keep_last=keep_last, in_use=in_use)
    barrier(ranks)
    return final


def remove_older(run: RunDir, *, keep_last: int, in_use: Path | None = None) -> None:
    """Remove the checkpoints that are older than the newest `keep_last`, but for the best one and
    that `in_use`."""
    best = best_checkpoint(run.checkpoints)
    for old in list_checkpoints(run.checkpoints)[:-keep_last]:
        if old not in (best, in_use):
            _remove(old)


def record_eval_loss(path: Path, loss: float) -> None:
    """Write the evaluation loss of a committed checkpoint into its state.json; link the best one of
    its run."""
    data = read_state_file(path)
    atomic.write_json(path / STATE_NAME, {**data, "eval_loss": loss})
    _link_best(path.parent)


def load_checkpoint(engine: Any, path: Path, *, run: RunDir, ranks: Ranks, seed: int) -> TrainState:
    """Check every file of the checkpoint at `path`, then put its state into `engine` and the random
    generators.

    Written by as many ranks and with the same ZeRO stage, it comes back bit for bit. Otherwise
    weights and optimizer state do, and the generators start anew from (`seed`, rank, step). Raises
    ChecksumError, IncompleteArtifactError or ArtifactError, the same on every rank, before anything
    is read.
    """
    data = read_state_file(path)
    _check_files(path, data["files"], ranks)
    if same_layout(data, world_size=ranks.world_size, zero_stage=engine.zero_optimization_stage()):
        _load_as_written(engine, path, ranks)
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
    """Move the checkpoints of `run` that are newer than `path` into `superseded`: the run goes on
    from `path` now.

    They would otherwise be what the next call goes on from, and the best one could be of steps that
    are not taken.
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
        "moved %s to %s: the run goes on from %s",
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
    aside = folder / f".tmp-{BEST_NAME}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(best.name)
    os.replace(aside, link)


def _load_as_written(engine: Any, path: Path, ranks: Ranks) -> None:
    loaded, _ = engine.load_checkpoint(
        str(path / ENGINE_DIR),
        tag=ENGINE_TAG,
        load_lr_scheduler_states=False,
        load_module_strict=not has_frozen_weights(engine),
    )
    if loaded is None:
        raise ArtifactError(f"DeepSpeed found no state in {path / ENGINE_DIR}{recovery_hint(path)}")
    _restore_rng(load_file(path / "rng" / f"rank-{ranks.rank:05d}.safetensors"), ranks.device)


def _load_converted(
    engine: Any, path: Path, data: dict[str, Any], *, run: RunDir, ranks: Ranks
) -> None:
    """Rank 0 converts aside; what a killed conversion leaves is removed when the run is opened
    again."""
    converted = run.checkpoints / f".tmp-universal-{path.name}"
    trained = trained_parameters(engine.module)
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
            convert(path, converted, zero_stage=data["zero_stage"], trained=trained)
        except SftError as exc:
            problem = exc
    found = broadcast_from_main(problem, ranks)
    if isinstance(found, SftError):
        raise found
    load_converted(engine, converted, trained=trained)
    barrier(ranks)
    if ranks.is_main:
        shutil.rmtree(converted)


def _commit(
    staged: Path,
    final: Path,
    state: TrainState,
    *,
    identity: dict[str, Any],
    ranks: Ranks,
    zero_stage: int,
    files: dict[str, dict[str, Any]],
) -> None:
    content = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "counters": asdict(state.counters),
        "window": None if state.window is None else asdict(state.window),
        "eval_loss": state.eval_loss,
        "identity": identity,
        "world_size": ranks.world_size,
        "zero_stage": zero_stage,
        "files": files,
    }
    atomic.write_json(staged / STATE_NAME, content)
    for folder, _, _ in os.walk(staged, topdown=False):
        atomic.fsync_dir(Path(folder))
    atomic.replace_dir(staged, final)


def _hash_together(staged: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Hash and flush every file, a share per rank; rank 0 gets the digests of all."""
    own: dict[str, dict[str, Any]] = {}
    for file in _share(sorted(path for path in staged.rglob("*") if path.is_file()), ranks):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        own[file.relative_to(staged).as_posix()] = {
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
        }
    merged: dict[str, dict[str, Any]] = {}
    for part in gather_to_main(own, ranks):
        assert isinstance(part, dict)
        merged.update(part)
    return merged


def _check_files(path: Path, files: dict[str, dict[str, Any]], ranks: Ranks) -> None:
    """Check a share per rank and raise the first error on all: a rank that raised alone would leave
    others waiting."""
    problem: ArtifactError | None = None
    try:
        for name in _share(sorted(files), ranks):
            check_digest(path, name, files[name])
    except ArtifactError as exc:
        problem = exc
    problems = gather_to_main(problem, ranks)
    first = broadcast_from_main(
        next((found for found in problems if found is not None), None), ranks
    )
    if isinstance(first, ArtifactError):
        raise first


def _share(items: list[T], ranks: Ranks) -> list[T]:
    return items[ranks.rank :: ranks.world_size]


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a crash half-way leaves no directory that looks whole."""
    doomed = path.with_name(f".tmp-{path.name}-old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_rng(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
