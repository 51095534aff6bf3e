"""Prove loss masks again from the shards alone: kinds, the sequence bounds and the mask policy of
the manifest.

    "assistant"       trained = what assistants wrote and the terminators, all of it, nothing else
    "all"             trained = every token but the first of a sequence
    "last_assistant"  trained = in each sequence a tail of what "assistant" would train, and no
                      other author speaks within it

Shards hold no message bounds. So where messages carried `train: false`, a turn of an assistant (a
run of its kinds, up to and with its terminator) must be trained wholly or not at all; whether it is
the one that the row named, they cannot say.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from prep.config import MaskConfig
from prep.selection.loss_mask import loss_mask_of
from prep.store.samples import Samples
from shared.shard_format import ASSISTANT_KINDS, KIND_MASK, Kind

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

_FOREIGN_KINDS = (Kind.SYSTEM, Kind.USER, Kind.TOOL)


@dataclass(frozen=True, slots=True)
class MaskFault:
    token: int  # position in the arrays that were given
    what: str


@dataclass(frozen=True, slots=True)
class MaskProof:
    fault: MaskFault | None
    turns_left_out: int  # turns (tokens under "all") that only a `train: false` can explain


def prove_mask(
    kind: Bytes, mask: Bytes, seq_offsets: Ints, *, policy: MaskConfig, may_be_flagged: bool
) -> MaskProof:
    """Compare `mask` uint8 [T] with what `policy` says of `kind` uint8 [T]; `seq_offsets` int64
    [S+1] runs from 0 to T.

    `may_be_flagged` says whether the source had messages with `train: false`.
    """
    trainable = _trainable(kind, seq_offsets, policy)
    extra = np.flatnonzero(mask > trainable)
    if len(extra):
        return MaskProof(
            MaskFault(int(extra[0]), "is trained, but its kind and place say that it must not be"),
            0,
        )
    if policy.train_on == "last_assistant":
        return MaskProof(_not_a_tail(kind, mask, trainable, seq_offsets), 0)
    missing = np.flatnonzero(trainable > mask)
    if policy.terminator == "last" and policy.train_on == "assistant":
        missing = missing[
            (kind[missing] & KIND_MASK) != Kind.TERMINATOR
        ]  # of a turn before the last one, cut off
    if not len(missing):
        return MaskProof(None, 0)
    if not may_be_flagged:
        return MaskProof(
            MaskFault(
                int(missing[0]), "is not trained, but its kind and place say that it must be"
            ),
            0,
        )
    if policy.train_on == "all":
        return MaskProof(None, len(missing))
    return _whole_turns(kind, mask, trainable, seq_offsets)


def _trainable(kind: Bytes, seq_offsets: Ints, policy: MaskConfig) -> Bytes:
    """Return what the policy trains where no message says otherwise, by the code that made the
    mask, uint8 [T]."""
    if policy.train_on == "last_assistant":
        policy = replace(policy, train_on="assistant")
    if policy.terminator == "last":
        kind = _without_earlier_terminators(kind, seq_offsets)
        policy = replace(policy, terminator="all")
    none = np.zeros(0, np.uint8)
    no_messages = np.zeros(len(seq_offsets), np.int64)
    return loss_mask_of(
        Samples(kind, seq_offsets, no_messages, none.astype(np.int64), none, none), policy
    )


def _without_earlier_terminators(kind: Bytes, seq_offsets: Ints) -> Bytes:
    """Return kinds in which only the last run of terminators of each sequence is one; the others
    become TEMPLATE."""
    ending = (kind & KIND_MASK) == Kind.TERMINATOR
    sequence_of = np.repeat(np.arange(len(seq_offsets) - 1), np.diff(seq_offsets))
    begins = (
        ending & ~np.append(False, ending[:-1] & (sequence_of[1:] == sequence_of[:-1]))[: len(kind)]
    )
    run_of = np.cumsum(begins)  # [T]
    last_run = np.zeros(len(seq_offsets) - 1, np.int64)
    np.maximum.at(last_run, sequence_of[ending], run_of[ending])
    return np.where(ending & (run_of != last_run[sequence_of]), np.uint8(Kind.TEMPLATE), kind)


def _not_a_tail(kind: Bytes, mask: Bytes, trainable: Bytes, seq_offsets: Ints) -> MaskFault | None:
    candidates = np.flatnonzero(trainable)  # [C] tokens
    sequence_of = np.searchsorted(seq_offsets, candidates, side="right") - 1  # [C]
    trained = mask[candidates] == 1
    same = np.diff(sequence_of) == 0
    gaps = np.flatnonzero(same & trained[:-1] & ~trained[1:])
    if len(gaps):
        return MaskFault(
            int(candidates[gaps[0] + 1]), "is not trained, but an earlier part of its turn is"
        )
    foreign_before = np.cumsum(np.isin(kind & KIND_MASK, _FOREIGN_KINDS))  # [T]
    crossed = np.diff(foreign_before[candidates]) > 0
    mixed = np.flatnonzero(same & trained[:-1] & crossed)
    if len(mixed):
        return MaskFault(
            int(candidates[mixed[0]]), "is trained, but it is not in the last assistant turn"
        )
    return None


def _whole_turns(kind: Bytes, mask: Bytes, trainable: Bytes, seq_offsets: Ints) -> MaskProof:
    turn_of = _turns(kind, seq_offsets)  # [T]
    wanted = np.bincount(turn_of, weights=trainable)
    given = np.bincount(turn_of, weights=mask)
    partial = np.flatnonzero((given > 0) & (given < wanted))
    if len(partial):
        token = np.flatnonzero((turn_of == partial[0]) & (trainable > mask))[0]
        return MaskProof(
            MaskFault(int(token), "is not trained, but other parts of its turn are"), 0
        )
    return MaskProof(None, int(((given == 0) & (wanted > 0)).sum()))


def _turns(kind: Bytes, seq_offsets: Ints) -> Ints:
    """Number the runs of assistant kinds, a terminator closing its run; what lies between has the
    number before it."""
    plain = kind & KIND_MASK
    is_assistant = np.isin(plain, ASSISTANT_KINDS)
    begins = is_assistant.copy()
    begins[1:] &= ~is_assistant[:-1] | (
        (plain[:-1] == Kind.TERMINATOR) & (plain[1:] != Kind.TERMINATOR)
    )
    begins[seq_offsets[:-1]] = True
    turns: Ints = np.cumsum(begins)
    return turns
