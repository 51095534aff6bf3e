"""Verify loss masks from the shards alone: kinds, the sequence bounds and the mask policy.

    "assistant"       trained = what assistants wrote and the terminators, all of it, nothing else
    "all"             trained = every token but the first of a sequence
    "last_assistant"  trained = in each sequence a tail of what "assistant" would train, and no
                      other author speaks within it

Shards hold no message bounds. So where messages have `train: false`, a turn of an assistant (a run
of its kinds, up to and with its terminator) must be trained wholly or not at all. Whether it is the
one that the row names, shards cannot tell.
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
class MaskResult:
    fault: MaskFault | None
    turns_left_out: int  # turns (tokens under "all") that only a `train: false` can explain


def verify_mask(
    kind: Bytes, mask: Bytes, seq_offsets: Ints, *, policy: MaskConfig, may_be_flagged: bool
) -> MaskResult:
    """Compare `mask` uint8 [T] with what `policy` trains of `kind` uint8 [T].

    `seq_offsets` int64 [S+1] runs from 0 to T. `may_be_flagged` says whether the source may have
    messages with `train: false`.
    """
    trainable = _trainable(kind, seq_offsets, policy)
    # Trained although it may not be: wrong under every policy, with or without flags.
    extra = np.flatnonzero(mask > trainable)
    if len(extra):
        what = "is trained, but its kind and position say that it must not be"
        return MaskResult(MaskFault(int(extra[0]), what), 0)
    if policy.train_on == "last_assistant":
        return MaskResult(_fault_of_tail(kind, mask, trainable, seq_offsets), 0)
    # Not trained although it could be: right only where a message has `train: false`.
    missing = np.flatnonzero(trainable > mask)
    if policy.terminator == "last" and policy.train_on == "assistant":
        # The last terminator of a sequence that was cut belongs to an earlier turn of its sample.
        missing = missing[(kind[missing] & KIND_MASK) != Kind.TERMINATOR]
    if not len(missing):
        return MaskResult(None, 0)
    if not may_be_flagged:
        what = "is not trained, but its kind and position say that it must be"
        return MaskResult(MaskFault(int(missing[0]), what), 0)
    if policy.train_on == "all":
        return MaskResult(None, len(missing))
    # What is missing must be whole turns. Number the runs of assistant kinds, each closed by its
    # terminator: what lies between two runs has the number of the one before, and is not trainable.
    plain = kind & KIND_MASK
    is_assistant = np.isin(plain, ASSISTANT_KINDS)
    begins = is_assistant.copy()
    begins[1:] &= ~is_assistant[:-1] | (
        (plain[:-1] == Kind.TERMINATOR) & (plain[1:] != Kind.TERMINATOR)
    )
    begins[seq_offsets[:-1]] = True
    turn_of = np.cumsum(begins)  # [T]
    num_trainable = np.bincount(turn_of, weights=trainable)
    num_trained = np.bincount(turn_of, weights=mask)
    partial = np.flatnonzero((num_trained > 0) & (num_trained < num_trainable))
    if len(partial):
        token = np.flatnonzero((turn_of == partial[0]) & (trainable > mask))[0]
        what = "is not trained, but other parts of its turn are"
        return MaskResult(MaskFault(int(token), what), 0)
    return MaskResult(None, int(((num_trained == 0) & (num_trainable > 0)).sum()))


def _trainable(kind: Bytes, seq_offsets: Ints, policy: MaskConfig) -> Bytes:
    """Return what the policy trains where no message has a flag, uint8 [T].

    Computed by the code that made the mask, for one policy that needs no message bounds.
    """
    if policy.train_on == "last_assistant":
        policy = replace(policy, train_on="assistant")
    if policy.terminator == "last":
        # Only the last run of terminators of each sequence is one; the others become TEMPLATE.
        is_terminator = (kind & KIND_MASK) == Kind.TERMINATOR
        sequence_of = np.repeat(np.arange(len(seq_offsets) - 1), np.diff(seq_offsets))
        follows = is_terminator[:-1] & (sequence_of[1:] == sequence_of[:-1])
        begins = is_terminator & ~np.append(False, follows)[: len(kind)]
        run_of = np.cumsum(begins)  # [T]
        last_run = np.zeros(len(seq_offsets) - 1, np.int64)
        np.maximum.at(last_run, sequence_of[is_terminator], run_of[is_terminator])
        is_earlier = is_terminator & (run_of != last_run[sequence_of])
        kind = np.where(is_earlier, np.uint8(Kind.TEMPLATE), kind)
        policy = replace(policy, terminator="all")
    none = np.zeros(0, np.uint8)
    no_messages = np.zeros(len(seq_offsets), np.int64)
    samples = Samples(kind, seq_offsets, no_messages, none.astype(np.int64), none, none)
    return loss_mask_of(samples, policy)


def _fault_of_tail(
    kind: Bytes, mask: Bytes, trainable: Bytes, seq_offsets: Ints
) -> MaskFault | None:
    """Return why the trained tokens of a sequence are not a tail of its trainable ones."""
    # Once training begins in a sequence, every trainable token behind is trained...
    candidates = np.flatnonzero(trainable)  # [C] tokens
    sequence_of = np.searchsorted(seq_offsets, candidates, side="right") - 1  # [C]
    trained = mask[candidates] == 1
    same = np.diff(sequence_of) == 0
    gaps = np.flatnonzero(same & trained[:-1] & ~trained[1:])
    if len(gaps):
        what = "is not trained, but an earlier part of its turn is"
        return MaskFault(int(candidates[gaps[0] + 1]), what)
    # ... and nobody else speaks between two of them: it is one message.
    foreign_before = np.cumsum(np.isin(kind & KIND_MASK, _FOREIGN_KINDS))  # [T]
    crossed = np.diff(foreign_before[candidates]) > 0
    mixed = np.flatnonzero(same & trained[:-1] & crossed)
    if len(mixed):
        what = "is trained, but it is not in the last assistant turn"
        return MaskFault(int(candidates[mixed[0]]), what)
    return None
