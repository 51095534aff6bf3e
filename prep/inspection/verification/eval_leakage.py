"""What an evaluation set has in common with the set that is trained on, as far as their shards
tell.

Rows are compared by where they come from, prompts by their tokens. A build holds prompts out by
their text before rendering; texts that differ only in what the template drops (white space at an
end) read the same in tokens.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import ArtifactError
from shared.shard_format import ASSISTANT_KINDS, EVAL_DIR, KIND_MASK, Kind
from shared.shard_reader import ShardSet

Ints = npt.NDArray[np.int64]

_BLOCK_TOKENS = 1 << 23
_ASKS = np.isin(np.arange(256) & KIND_MASK, (Kind.USER, Kind.TOOL))  # bool [256] by the kind column
_ANSWERS = np.isin(np.arange(256) & KIND_MASK, ASSISTANT_KINDS)


def check_eval_leakage(train: ShardSet, held_out: ShardSet) -> str:
    """Return in a line what was compared. Raises ArtifactError for a row that is on both sides."""
    is_of_build = {**train.manifest.inputs, "part": EVAL_DIR} == held_out.manifest.inputs
    if is_of_build:
        _check_rows(train, held_out)
    prompts = {prompt for shard in held_out.shards for prompt in prompts_of(shard)}
    both = prompts & {
        prompt for shard in train.shards for prompt in prompts_of(shard) if prompt in prompts
    }
    rows = (
        "no row is on both sides"
        if is_of_build
        else "made from other inputs: rows are not compared"
    )
    return f"{rows}; {len(both):,} of {len(prompts):,} prompts read like one that is trained on"


def prompts_of(columns: dict[str, npt.NDArray[Any]]) -> Iterator[bytes]:
    """Yield a hash of the prompt of every sequence of a shard that has one: the tokens before an
    answer begins.

    Later fragments of a sample, and sequences in which nothing is answered, have none.
    """
    offsets, first = columns["seq_offsets"], 0
    while first < len(offsets) - 1:
        last = max(
            first + 1,
            int(np.searchsorted(offsets, offsets[first] + _BLOCK_TOKENS, side="right")) - 1,
        )
        block = slice(offsets[first], offsets[last])
        is_first_part = columns["seq_origin"][first:last, 2] == 0
        own_offsets = offsets[first : last + 1] - offsets[first]
        yield from _prompts(
            columns["tokens"][block], columns["kind"][block], own_offsets, is_first_part
        )
        first = last


def _prompts(
    tokens: npt.NDArray[np.int32],
    kind: npt.NDArray[np.uint8],
    offsets: Ints,
    is_first_part: npt.NDArray[np.bool_],
) -> Iterator[bytes]:
    asks, answers = np.flatnonzero(_ASKS[kind]), np.flatnonzero(_ANSWERS[kind])
    asked = _next(
        asks, offsets[:-1], len(kind)
    )  # int64 [S] first question of each sequence, or of a later one
    answered = _next(answers, asked, len(kind))
    chosen = is_first_part & (answered < offsets[1:])
    for start, stop in zip(offsets[:-1][chosen].tolist(), answered[chosen].tolist(), strict=True):
        yield hashlib.blake2b(tokens[start:stop].tobytes(), digest_size=16).digest()


def _next(places: Ints, after: Ints, end: int) -> Ints:
    """Return the first of the ascending `places` at or behind each of `after`, or `end`."""
    following: Ints = np.append(places, end)[np.searchsorted(places, after)]
    return following


def _check_rows(train: ShardSet, held_out: ShardSet) -> None:
    both = np.intersect1d(_rows_of(train), _rows_of(held_out))
    if len(both):
        source, row = divmod(int(both[0]), 1 << 40)
        raise ArtifactError(
            f"{held_out.path}: source {train.manifest.sources[source].name!r} row {row} is held out"
            " and trained on; build the set again"
        )


def _rows_of(shard_set: ShardSet) -> Ints:
    """Return the rows of a set, each once, as one number, int64."""
    origins = [shard["seq_origin"] for shard in shard_set.shards]
    return np.unique(
        np.concatenate([origin[:, 0] * (1 << 40) + origin[:, 1] for origin in origins])
    )
