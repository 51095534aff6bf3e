"""`sft-train which`: the source rows of a step of a run, with their text and its trained pieces.

Everything follows from RUN/config.json and the shard set, as in the run itself: nothing is recorded
while training. No torch is needed; the tokenizer of the set turns ids back into text.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared import config
from shared.errors import ArtifactError, ConfigError, FingerprintMismatchError, PrerequisiteError
from shared.shard_reader import ShardSet, open_shard_set
from train.config import TrainConfig
from train.data.step_plan import StepPlan, plan_step
from train.run.directory import RunDir, read_description
from train.run.prepare import make_run_order

# Characters of a sequence that are shown without --full.
_SHORT = 200
_TRAINED = ("[[", "]]")
_TRAINED_IN_COLOUR = ("\x1b[32m", "\x1b[0m")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSequence:
    """A sequence that a step trains on."""

    rank: int
    """The first of the ranks that share its row."""
    micro_batch: int
    """Counted from 1."""
    source: str
    row: int
    first_token: int
    """Of the sample: not 0 if a long row was split before it."""
    tokens: int
    loss_tokens: int
    pieces: list[tuple[str, bool]]
    """The text in order: a piece, and whether it was trained."""


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
    """Yield lines about each sequence of a step, counted from 1: of one rank, or of all in order.

    Ranks are those of the last start that trained. Raises ConfigError for a step or rank that the
    run does not have, ArtifactError if its description or its shards are missing or do not match.
    """
    description, shard_set = _open_run(RunDir(run_path), shards)
    recipe = config.build(TrainConfig, description["recipe"], str(run_path))
    order = make_run_order(recipe, shard_set.manifest)
    if not 1 <= step <= order.total_steps:
        raise ConfigError(
            f"--step {step}: {run_path} has {order.total_steps} steps; expected 1 to"
            f" {order.total_steps}"
        )
    num_ranks, shared_by = description["world_size"], recipe.engine.sequence_parallel
    if rank is not None and not 0 <= rank < num_ranks:
        raise ConfigError(
            f"--rank {rank}: {run_path} ran on {num_ranks} ranks; expected 0 to {num_ranks - 1}"
        )
    plan = plan_step(
        shard_set,
        order,
        step - 1,
        world_size=num_ranks // shared_by,
        packs_per_micro_batch=recipe.batch.packs_per_micro_batch,
    )
    for sequence in _sequences(plan, shard_set, shared_by):
        # Ranks that share rows are listed under the first of them.
        if rank is not None and sequence.rank != rank // shared_by * shared_by:
            continue
        if as_json:
            yield json.dumps({"step": step, **asdict(sequence)})
            continue
        start = f" from token {sequence.first_token}" if sequence.first_token else ""
        yield (
            f"rank {sequence.rank} micro-batch {sequence.micro_batch} "
            f" {sequence.source}:{sequence.row}{start}  {sequence.tokens} tokens,"
            f" {sequence.loss_tokens} trained\n    {_mark(sequence.pieces, full, colour)}"
        )


def _open_run(run: RunDir, shards: Path | None) -> tuple[dict[str, Any], ShardSet]:
    """Return the description of the run and the shard set that it was trained on."""
    description = read_description(run)
    if description is None:
        raise ArtifactError(f"{run.path} holds no run: there is no {run.config.name}")
    if not isinstance(description.get("world_size"), int):
        raise ArtifactError(
            f"{run.config} does not tell on how many ranks the run was; it is not from this version"
        )
    path = shards or Path(description["shards"]["path"])
    if not path.is_dir():
        raise ArtifactError(
            f"the shard set of the run is not at {path} any more; give its path with --shards"
        )
    shard_set = open_shard_set(path)
    expected, fingerprint = description["shards"]["fingerprint"], shard_set.manifest.fingerprint
    if fingerprint != expected:
        raise FingerprintMismatchError(
            f"{path} has fingerprint {fingerprint[:16]}..., the run was trained on"
            f" {expected[:16]}...; name that set with --shards"
        )
    return description, shard_set


def _sequences(plan: StepPlan, shard_set: ShardSet, shared_by: int) -> Iterator[StepSequence]:
    """Yield the sequences of the step in the order in which the ranks run them."""
    try:
        import tokenizers
    except ImportError as exc:
        raise PrerequisiteError(
            "text needs the package tokenizers; install sft-shards[train]"
        ) from exc
    file = shard_set.tokenizer_dir / "tokenizer.json"
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; build or pull the set again")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    sequences = (
        (group, number, plan.packs[position], index)
        for group, micro_batches in enumerate(plan.ranks)
        for number, positions in enumerate(micro_batches, start=1)
        for position in positions
        for index in range(len(plan.packs[position].seq_origin))
    )
    for group, number, pack, index in sequences:
        start, end = pack.seq_offsets[index : index + 2].tolist()
        source, row, first_token = pack.seq_origin[index].tolist()
        tokens = pack.tokens[start:end].tolist()
        mask = pack.loss_mask[start:end].astype(bool).tolist()
        # A piece is a run of tokens that are all trained, or all not: decoded together, since a
        # character may be spread over several tokens.
        pieces = []
        for trained, pairs in itertools.groupby(zip(mask, tokens, strict=True), lambda p: p[0]):
            ids = [token for _, token in pairs]
            pieces.append((tokenizer.decode(ids, skip_special_tokens=False), trained))
        yield StepSequence(
            rank=group * shared_by,
            micro_batch=number,
            source=shard_set.manifest.sources[source].name,
            row=row,
            first_token=first_token,
            tokens=end - start,
            loss_tokens=sum(mask),
            pieces=pieces,
        )


def _mark(pieces: list[tuple[str, bool]], full: bool, colour: bool) -> str:
    """Return the text with the trained pieces marked, cut short unless it is to be `full`."""
    before, after = _TRAINED_IN_COLOUR if colour else _TRAINED
    left = sum(len(text) for text, _ in pieces) if full else _SHORT
    marked = []
    for text, trained in pieces:
        # Characters that could control a terminal are written out.
        shown = "".join(
            char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text[:left]
        ).replace("\n", "\n    " if full else "\\n")
        marked.append(f"{before}{shown}{after}" if trained else shown)
        left -= len(text)
        if left < 0:
            return "".join(marked) + " ..."
    return "".join(marked)
