"""`sft-train which`: the source rows of a step of a run, with their text and what of it was
trained.

Everything follows from RUN/config.json and the shard set, as in the run itself: nothing is recorded
while training. Needs no torch; the set's own tokenizer turns ids back into text.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared import config
from shared.errors import ArtifactError, ConfigError, FingerprintMismatchError, PrerequisiteError
from shared.shard_reader import Pack, ShardSet, open_shard_set
from train.config import TrainConfig
from train.data.step_plan import StepPlan, plan_step
from train.run.directory import RunDir, read_description
from train.run.prepare import make_run_order

_SHORT = 200
_TRAINED = ("[[", "]]")
_TRAINED_IN_COLOUR = ("\x1b[32m", "\x1b[0m")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSequence:
    """A sequence that a step trains on."""

    rank: int
    """That runs it; the first of those that share its row."""
    micro_batch: int
    """Counted from 1."""
    source: str
    row: int
    first_token: int
    """Of the sample: not 0 where a long row was split."""
    tokens: int
    loss_tokens: int
    pieces: list[tuple[str, bool]]
    """Text, and whether it was trained, in turn."""


def which(
    run_path: Path,
    *,
    step: int,
    rank: int | None,
    shards: Path | None,
    as_json: bool,
    full: bool,
    colour: bool,
) -> Iterator[str]:
    """Yield lines about each sequence of a step, counted from 1: of one rank, or of all in rank
    order.

    Ranks are those of the last call that trained. Raises ConfigError for a step or rank that the
    run does not have, ArtifactError where its description or its shards are missing or other ones.
    """
    description = _description(RunDir(run_path))
    shard_set = _open_shards(description, shards)
    plan, shared_by = _plan(description, shard_set, step, str(run_path))
    num_ranks = len(plan.ranks) * shared_by
    if rank is not None and not 0 <= rank < num_ranks:
        raise ConfigError(
            f"--rank {rank}: {run_path} ran on {num_ranks} ranks; expected 0 to {num_ranks - 1}"
        )
    for sequence in _sequences(plan, shard_set, shared_by):
        if rank is None or sequence.rank == rank // shared_by * shared_by:
            yield (
                json.dumps({"step": step, **asdict(sequence)})
                if as_json
                else _in_words(sequence, full, colour)
            )


def _description(run: RunDir) -> dict[str, Any]:
    description = read_description(run)
    if description is None:
        raise ArtifactError(f"{run.path} holds no run: there is no {run.config.name}")
    if not isinstance(description.get("world_size"), int):
        raise ArtifactError(
            f"{run.config} does not say on how many ranks the run was; it is not from this version"
        )
    return description


def _open_shards(description: dict[str, Any], given: Path | None) -> ShardSet:
    path = given or Path(description["shards"]["path"])
    if not path.is_dir():
        raise ArtifactError(
            f"the shard set of the run is not at {path} any more; say where it is with --shards"
        )
    shard_set = open_shard_set(path)
    expected, found = description["shards"]["fingerprint"], shard_set.manifest.fingerprint
    if found != expected:
        raise FingerprintMismatchError(
            f"{path} has fingerprint {found[:16]}..., the run was trained on {expected[:16]}...;"
            " name that set with --shards"
        )
    return shard_set


def _plan(
    description: dict[str, Any], shard_set: ShardSet, step: int, where: str
) -> tuple[StepPlan, int]:
    """Return what the step holds and how many ranks share each row."""
    recipe = config.build(TrainConfig, description["recipe"], where)
    order = make_run_order(recipe, shard_set.manifest)
    if not 1 <= step <= order.total_steps:
        raise ConfigError(
            f"--step {step}: {where} has {order.total_steps} steps; expected 1 to"
            f" {order.total_steps}"
        )
    shared_by = recipe.engine.sequence_parallel
    plan = plan_step(
        shard_set,
        order,
        step - 1,
        world_size=description["world_size"] // shared_by,
        packs_per_micro_batch=recipe.batch.packs_per_micro_batch,
    )
    return plan, shared_by


def _sequences(plan: StepPlan, shard_set: ShardSet, shared_by: int) -> Iterator[StepSequence]:
    tokenizer = _open_tokenizer(shard_set)
    for group, micro_batches in enumerate(plan.ranks):
        for number, positions in enumerate(micro_batches, start=1):
            for pack in (plan.packs[position] for position in positions):
                for index in range(len(pack.seq_origin)):
                    yield _sequence(
                        pack,
                        index,
                        shard_set,
                        tokenizer,
                        rank=group * shared_by,
                        micro_batch=number,
                    )


def _sequence(
    pack: Pack, index: int, shard_set: ShardSet, tokenizer: Any, *, rank: int, micro_batch: int
) -> StepSequence:
    start, end = pack.seq_offsets[index : index + 2].tolist()
    source, row, first_token = pack.seq_origin[index].tolist()
    tokens, mask = pack.tokens[start:end].tolist(), pack.loss_mask[start:end].astype(bool).tolist()
    pieces = []
    for trained, run in itertools.groupby(zip(mask, tokens, strict=True), key=lambda pair: pair[0]):
        pieces.append(
            (tokenizer.decode([token for _, token in run], skip_special_tokens=False), trained)
        )
    return StepSequence(
        rank=rank,
        micro_batch=micro_batch,
        source=shard_set.manifest.sources[source].name,
        row=row,
        first_token=first_token,
        tokens=end - start,
        loss_tokens=sum(mask),
        pieces=pieces,
    )


def _in_words(sequence: StepSequence, full: bool, colour: bool) -> str:
    first = f" from token {sequence.first_token}" if sequence.first_token else ""
    return (
        f"rank {sequence.rank} micro-batch {sequence.micro_batch} "
        f" {sequence.source}:{sequence.row}{first}  {sequence.tokens} tokens,"
        f" {sequence.loss_tokens} trained\n    {_marked(sequence.pieces, full, colour)}"
    )


def _marked(pieces: list[tuple[str, bool]], full: bool, colour: bool) -> str:
    """Return the text with the trained parts marked, cut after so many characters unless it is to
    be `full`."""
    before, after = _TRAINED_IN_COLOUR if colour else _TRAINED
    left = sum(len(text) for text, _ in pieces) if full else _SHORT
    parts = []
    for text, trained in pieces:
        shown = _printable(text[:left], keep_lines=full)
        parts.append(f"{before}{shown}{after}" if trained else shown)
        left -= len(text)
        if left < 0:
            return "".join(parts) + " ..."
    return "".join(parts)


def _printable(text: str, *, keep_lines: bool) -> str:
    """Return text that can do nothing to a terminal; line ends stay, indented, or are written
    out."""
    kept = "".join(
        char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text
    )
    return kept.replace("\n", "\n    " if keep_lines else "\\n")


def _open_tokenizer(shard_set: ShardSet) -> Any:
    try:
        import tokenizers
    except ImportError as exc:
        raise PrerequisiteError(
            "text needs the package tokenizers; install sft-shards[train]"
        ) from exc
    file = shard_set.tokenizer_dir / "tokenizer.json"
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; build or pull the set again")
    return tokenizers.Tokenizer.from_file(str(file))
