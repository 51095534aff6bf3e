"""Mask policy: kinds and messages -> which tokens are trained. Pure numpy over many samples at
once."""

import numpy as np
import numpy.typing as npt

from prep.config import MaskConfig
from prep.store.samples import ROLE_ASSISTANT, TRAIN_NO, Bytes, Samples, message_ends
from shared.shard_format import ASSISTANT_KINDS, KIND_MASK, STRADDLES, Kind


def loss_mask_of(samples: Samples, policy: MaskConfig) -> Bytes:
    """Return the loss mask of whole samples, uint8 [N]; the first token of a sample is never
    trained.

    "assistant": what assistants wrote and the terminators. "last_assistant": of that, the last
    assistant message only. "all": every token. A message with `train: false` is left out under each
    of them. Reasoning, tool calls and terminators of assistants can be left out by kind; a token
    that covers text of two kinds has the kind of one.
    """
    mask = _trained_by_kind(policy)[samples.kind]
    untrained = samples.message_train == TRAIN_NO
    if policy.train_on == "last_assistant":
        untrained |= ~_is_last_assistant(samples)
    if policy.terminator == "last" and policy.train_on != "all":
        ending = np.flatnonzero((samples.kind & KIND_MASK) == Kind.TERMINATOR)
        owner = np.searchsorted(samples.message_offsets, ending, side="right") - 1
        mask[ending[~_is_last_assistant(samples)[owner]]] = 0
    ends = message_ends(samples)
    if untrained.any():
        inside = np.zeros(
            len(mask) + 1, np.int8
        )  # +1 where an untrained message begins, -1 where it ends
        np.add.at(inside, samples.message_offsets[untrained], 1)
        np.add.at(inside, ends[untrained], -1)
        mask &= (np.cumsum(inside[:-1], dtype=np.int8) <= 0).view(
            np.uint8
        )  # they do not overlap: 0 or 1
    starts = samples.sample_offsets[:-1]
    mask[starts[np.diff(samples.sample_offsets) > 0]] = 0
    return mask


def _trained_by_kind(policy: MaskConfig) -> Bytes:
    """Return 1 for every value of the kind column that is trained, uint8 [256]."""
    values = np.arange(256)
    if policy.train_on == "all":
        return np.ones(256, np.uint8)
    left_out = {
        Kind.REASONING: not policy.reasoning,
        Kind.TOOL_CALL: not policy.tool_calls,
        Kind.TERMINATOR: policy.terminator == "none",
    }
    trained = np.isin(
        values & KIND_MASK, [kind for kind in ASSISTANT_KINDS if not left_out.get(kind)]
    )
    if policy.boundary == "inside":
        trained &= (values & STRADDLES) == 0
    return trained.astype(np.uint8)


def _is_last_assistant(samples: Samples) -> npt.NDArray[np.bool_]:
    assistant = np.flatnonzero(samples.message_role == ROLE_ASSISTANT)
    sample_of = np.searchsorted(samples.sample_messages, assistant, side="right") - 1
    last = np.full(len(samples.sample_offsets) - 1, -1, np.int64)
    last[sample_of] = assistant  # in order, so the last assignment of a sample stands
    result = np.zeros(len(samples.message_role), np.bool_)
    result[last[last >= 0]] = True
    return result
