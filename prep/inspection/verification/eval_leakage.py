"""What an evaluation set has in common with the set that is trained on, as far as shards tell.

Rows are compared by their origin, prompts by their tokens. A build holds prompts out by their text
before rendering; texts that differ only in what the template drops (white space at an end) have the
same tokens.
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
# bool [256], by the value of the kind column
_IS_QUESTION = np.isin(np.arange(256) & KIND_MASK, (Kind.USER, Kind.TOOL))
_IS_ANSWER = np.isin(np.arange(256) & KIND_MASK, ASSISTANT_KINDS)


def check_eval_leakage(train: ShardSet, held_out: ShardSet) -> str:
    """Return in a line what was compared. Raises ArtifactError for a row that is on both sides."""
    is_of_build = {**train.manifest.inputs, "part": EVAL_DIR} == held_out.manifest.inputs
    rows = "made from other inputs: rows are not compared"
    if is_of_build:
        both = np.intersect1d(_rows_of(train), _rows_of(held_out))
        if len(both):
            source, row = divmod(int(both[0]), 1 << 40)
            raise ArtifactError(
                f"{held_out.path}: source {train.manifest.sources[source].name!r} row {row} is held"
                " out and trained on; build the set again"
            )
        rows = "no row is on both sides"
    prompts = {prompt for shard in held_out.shards for prompt in prompts_of(shard)}
    shared = {prompt for shard in train.shards for prompt in prompts_of(shard) if prompt in prompts}
    return f"{rows}; {len(shared):,} of {len(prompts):,} prompts read like one that is trained on"


def prompts_of(columns: dict[str, npt.NDArray[Any]]) -> Iterator[bytes]:
    """Yield a hash of the prompt of every sequence of a shard that has one.

    A prompt is the tokens before an answer to something begins. Later fragments of a sample, and
    sequences in which nothing is answered, have none.
    """
    offsets, first = columns["seq_offsets"], 0
    while first < len(offsets) - 1:
        # A block of whole sequences: one at least, and about _BLOCK_TOKENS.
        end = int(np.searchsorted(offsets, offsets[first] + _BLOCK_TOKENS, side="right")) - 1
        last = max(first + 1, end)
        block = slice(offsets[first], offsets[last])
        tokens, kind = columns["tokens"][block], columns["kind"][block]
        starts = offsets[first:last] - offsets[first]  # [S]
        ends = offsets[first + 1 : last + 1] - offsets[first]  # [S]
        # Where none is left in its sequence, these lie in a later one, and the prompt is none.
        question = _next(np.flatnonzero(_IS_QUESTION[kind]), starts, len(kind))  # [S]
        answer = _next(np.flatnonzero(_IS_ANSWER[kind]), question, len(kind))  # [S]
        has_prompt = (columns["seq_origin"][first:last, 2] == 0) & (answer < ends)
        for start, stop in zip(starts[has_prompt], answer[has_prompt], strict=True):
            yield hashlib.blake2b(tokens[start:stop].tobytes(), digest_size=16).digest()
        first = last


def _next(positions: Ints, after: Ints, end: int) -> Ints:
    """Return the first of the ascending `positions` at or behind each of `after`, or `end`."""
    following: Ints = np.append(positions, end)[np.searchsorted(positions, after)]
    return following


def _rows_of(shard_set: ShardSet) -> Ints:
    """Return the rows of a set, each once, as one number, int64."""
    origins = [shard["seq_origin"] for shard in shard_set.shards]
    return np.unique(
        np.concatenate([origin[:, 0] * (1 << 40) + origin[:, 1] for origin in origins])
    )
