"""Everything that can be decided or refused before torch is imported.

That is the recipe, the shards, the order of the steps, and what the run directory holds already.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.errors import ArtifactError, ConfigError, DataError
from shared.shard_format import EVAL_DIR, MANIFEST_NAME, Manifest, Totals
from shared.shard_reader import ShardSet, open_shard_set
from train.config import TrainConfig
from train.data.step_order import StepOrder, check_divides, make_order, units_per_step
from train.data.step_plan import check_conversations
from train.recipe_file import load_recipe
from train.run.checkpoint_layout import list_checkpoints, read_state_file, same_layout
from train.run.directory import (
    RunDir,
    check_identity,
    check_output,
    identity,
    read_description,
    read_status,
)
from train.sizing.zero_stage import resolve_zero_stage

RUNS_DIR = Path("runs")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRequest:
    """The command line of `sft-train`: each field is the option of its name, in this order."""

    shards: Path
    recipe: str | None = None
    model: str | None = None
    output: Path | None = None
    eval_shards: Path | None = None
    max_steps: int | None = None
    stop_after: int | None = None
    push_to_hub: str | None = None
    push_checkpoints: str | None = None
    resume: str = "auto"
    trust_checkpoint: bool = False
    settings: tuple[str, ...] = ()
    """--set"""
    verbosity: int = 0
    """-v, -vv; -1 is -q"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run that is ready to start."""

    request: TrainRequest
    recipe: TrainConfig
    shard_set: ShardSet
    order: StepOrder
    run: RunDir
    identity: dict[str, Any]
    resume_from: Path | None
    eval_set: ShardSet | None

    @property
    def is_complete(self) -> bool:
        """Whether the run has been trained and exported."""
        status = read_status(self.run)
        return status is not None and status.get("state") == "complete" and self.run.model.is_dir()


def prepare(request: TrainRequest) -> Prepared:
    """Open and check what `request` names. Raises ConfigError, DataError or ArtifactError.

    Another start may change the run directory later: what counts is `decide_again`, under the
    run's lock.
    """
    recipe, shard_set = open_inputs(request)
    manifest = shard_set.manifest
    order = make_run_order(recipe, manifest)
    run = RunDir(request.output or RUNS_DIR / f"{recipe.name}-{manifest.name}")
    check_output(run)
    run_identity = identity(recipe, shard_set, order)
    return Prepared(
        request=request,
        recipe=recipe,
        shard_set=shard_set,
        order=order,
        run=run,
        identity=run_identity,
        resume_from=_find_checkpoint(run, request, run_identity),
        eval_set=_open_eval_set(request.eval_shards, shard_set),
    )


def decide_again(prepared: Prepared) -> Prepared:
    """Return `prepared` with the checkpoint to resume from as the run directory is now.

    Call it under the run's lock: another start may have trained, stopped or completed the run
    since. Raises what `prepare` raises.
    """
    path = _find_checkpoint(prepared.run, prepared.request, prepared.identity)
    return replace(prepared, resume_from=path)


def open_inputs(request: TrainRequest) -> tuple[TrainConfig, ShardSet]:
    """Return recipe and shard set of `request`. Raises ConfigError, DataError or ArtifactError."""
    shard_set = open_shard_set(request.shards)
    manifest = shard_set.manifest
    if not manifest.totals.loss_tokens:
        raise DataError(
            f"{request.shards} has no loss tokens: every token is masked, so there is nothing to"
            " learn from"
        )
    recipe_name = request.recipe or manifest.recipe
    if not recipe_name:
        raise ConfigError(
            f"no recipe: {request.shards} names none; give --recipe NAME|FILE.toml (sft-train"
            " recipes lists what ships)"
        )
    recipe = load_recipe(
        recipe_name, request.settings, model=request.model, max_steps=request.max_steps
    )
    if recipe.model.config is None and not recipe.model.name:
        raise ConfigError(
            "no model: give --model NAME|DIR, or set model.name or [model.config] in the recipe"
        )
    return recipe, shard_set


def _open_eval_set(path: Path | None, shard_set: ShardSet) -> ShardSet | None:
    """Return the set at `path`, or the evaluation set inside the shard set, if any.

    Raises DataError or ArtifactError.
    """
    if path is None:
        path = shard_set.path / EVAL_DIR
        if not (path / MANIFEST_NAME).exists():
            return None
    eval_set = open_shard_set(path)
    ours, theirs = shard_set.manifest, eval_set.manifest
    # By the digests of its files: a tokenizer may have another name and be the same.
    if theirs.tokenizer.files != ours.tokenizer.files:
        raise DataError(
            f"{path} was made with another tokenizer ({theirs.tokenizer.name}) than"
            f" {shard_set.path} ({ours.tokenizer.name}); build both from the same one"
        )
    if theirs.max_seq_len > ours.max_seq_len:
        raise DataError(
            f"{path} has sequences of up to {theirs.max_seq_len} tokens, {shard_set.path} of up to"
            f" {ours.max_seq_len}; build the evaluation set with max_seq_len = {ours.max_seq_len}"
            " or less"
        )
    if not theirs.totals.loss_tokens:
        raise DataError(f"{path} has no loss tokens; there is nothing to evaluate")
    return eval_set


def make_run_order(recipe: TrainConfig, manifest: Manifest) -> StepOrder:
    """Return the order of a run. Raises ConfigError for a batch that the set cannot give."""
    if recipe.batch.conversations_per_step is not None:
        check_conversations(manifest)
    return order_by_size(
        recipe,
        fingerprint=manifest.fingerprint,
        max_seq_len=manifest.max_seq_len,
        totals=manifest.totals,
    )


def order_by_size(
    recipe: TrainConfig, *, fingerprint: str, max_seq_len: int, totals: Totals
) -> StepOrder:
    """Return the order of a run over a shard set of that size, which need not exist."""
    unit, per_step = units_per_step(recipe.batch, max_seq_len=max_seq_len)
    return make_order(
        unit=unit,
        fingerprint=fingerprint,
        seed=recipe.run.seed,
        num_units=totals.packs if unit == "pack" else totals.sequences,
        units_per_step=per_step,
        epochs=recipe.schedule.epochs,
        max_steps=recipe.schedule.max_steps,
    )


def check_ranks(prepared: Prepared, world_size: int) -> None:
    """Raise ConfigError unless `world_size` ranks can run the steps."""
    check_division(prepared.recipe, prepared.order, world_size)


def check_division(recipe: TrainConfig, order: StepOrder, world_size: int) -> None:
    """Raise ConfigError unless the steps of `order` divide over `world_size` ranks."""
    stage = resolve_zero_stage(recipe.engine, world_size=world_size)
    if recipe.lora.quantize != "none" and stage == 3:
        raise ConfigError(
            f"lora.quantize = {recipe.lora.quantize!r} needs whole weights on every rank, and ZeRO"
            " stage 3 splits them; set engine.zero_stage = 2"
        )
    shared_by = recipe.engine.sequence_parallel
    if world_size % shared_by:
        raise ConfigError(
            f"engine.sequence_parallel = {shared_by} does not divide {world_size} ranks"
        )
    # Conversations divide over any number of ranks.
    if order.unit == "pack":
        check_divides(
            packs_per_step=order.units_per_step,
            packs_per_micro_batch=recipe.batch.packs_per_micro_batch,
            world_size=world_size // shared_by,
        )


def needs_resharding(prepared: Prepared, world_size: int) -> bool:
    """Return whether the checkpoint to resume from was written by another number of ranks or with
    another ZeRO stage."""
    if prepared.resume_from is None:
        return False
    stage = resolve_zero_stage(prepared.recipe.engine, world_size=world_size)
    state = read_state_file(prepared.resume_from)
    return not same_layout(state, world_size=world_size, zero_stage=stage)


def _find_checkpoint(run: RunDir, request: TrainRequest, identity: dict[str, Any]) -> Path | None:
    """Return the checkpoint to resume from, None to start at step 0."""
    # What the run was begun with: its description, or else its last checkpoint.
    description, resume = read_description(run), request.resume
    has_records = run.metrics.exists() and run.metrics.stat().st_size > 0
    if not has_records and not run.model.exists() and not any(run.checkpoints.glob("*")):
        # A start that failed before its first step binds nobody to its recipe.
        description = None
    if resume == "never":
        if description is not None:
            raise ArtifactError(
                f"{run.path} holds a run already; remove it, or name another directory with"
                " --output"
            )
        return None
    if description is not None:
        check_identity(description["identity"], identity, run.path)
    committed = list_checkpoints(run.checkpoints)
    if committed and description is None:
        if not request.trust_checkpoint:
            raise ArtifactError(
                f"{run.path} has checkpoints but no config.json: they were not written there."
                " DeepSpeed's files can run code when they are read; if you trust who wrote them,"
                " give --trust-checkpoint"
            )
        check_identity(read_state_file(committed[-1])["identity"], identity, run.path)
    # Which of the checkpoints to take: the last one, one of this run, or one of another run.
    if resume == "auto":
        return committed[-1] if committed else None
    wanted = Path(resume)
    if not wanted.is_dir():
        raise ArtifactError(
            f"--resume {resume}: there is no such checkpoint; expected auto, never or its directory"
        )
    matches = [path for path in committed if path.resolve() == wanted.resolve()]
    if matches:
        return matches[0]
    if not request.trust_checkpoint:
        raise ArtifactError(
            f"--resume {resume} is not a checkpoint of {run.path}. DeepSpeed's files can run code"
            " when they are read; if you trust who wrote it, give --trust-checkpoint to start a run"
            " from it in another --output"
        )
    if committed:
        raise ArtifactError(
            f"{run.path} has checkpoints already; leave --resume out to resume from"
            f" {committed[-1].name}, or start from {resume} in another --output"
        )
    check_identity(read_state_file(wanted)["identity"], identity, wanted)
    return wanted
