"""Mask policy: kinds and messages -> which tokens are trained.

Pure numpy over many samples at once; text and ids play no part.
"""

import numpy as np
import numpy.typing as npt

from prep.config import MaskConfig
from prep.store.samples import ROLE_ASSISTANT, TRAIN_NO, Bytes, Samples, message_ends
from shared.shard_format import ASSISTANT_KINDS, KIND_MASK, STRADDLES, Kind


def loss_mask_of(samples: Samples, policy: MaskConfig) -> Bytes:
    """Return the loss mask of whole samples, uint8 [N]. The first token of one is never trained.

    "assistant": what assistants wrote and the terminators. "last_assistant": of that, the last
    assistant message only. "all": every token. A message with `train: false` is left out under each
    of them. Reasoning, tool calls and terminators of assistants can be left out by kind; a token
    that covers text of two kinds has the kind of one.
    """
    # By kind alone, as a table of all values of the kind column.
    is_trained = np.ones(256, np.bool_)
    if policy.train_on != "all":
        is_left_out = {
            Kind.REASONING: not policy.reasoning,
            Kind.TOOL_CALL: not policy.tool_calls,
            Kind.TERMINATOR: policy.terminator == "none",
        }
        values = np.arange(256)
        kinds = [kind for kind in ASSISTANT_KINDS if not is_left_out.get(kind)]
        is_trained = np.isin(values & KIND_MASK, kinds)
        if policy.boundary == "inside":
            is_trained &= (values & STRADDLES) == 0
    mask = is_trained.astype(np.uint8)[samples.kind]

    untrained = samples.message_train == TRAIN_NO
    # By message.
    if policy.train_on == "last_assistant":
        untrained |= ~_is_last_assistant(samples)
    if policy.terminator == "last" and policy.train_on != "all":
        # A terminator belongs to the last message that begins before it.
        terminators = np.flatnonzero((samples.kind & KIND_MASK) == Kind.TERMINATOR)
        message_of = np.searchsorted(samples.message_offsets, terminators, side="right") - 1
        mask[terminators[~_is_last_assistant(samples)[message_of]]] = 0
    if untrained.any():
        # +1 where an untrained message begins, -1 where it ends. Messages do not overlap, so the
        # running sum is 1 inside of one and 0 elsewhere.
        steps = np.zeros(len(mask) + 1, np.int8)
        np.add.at(steps, samples.message_offsets[untrained], 1)
        np.add.at(steps, message_ends(samples)[untrained], -1)
        mask &= (np.cumsum(steps[:-1], dtype=np.int8) <= 0).view(np.uint8)
    # Nothing comes before the first token that could predict it.
    mask[samples.sample_offsets[:-1][np.diff(samples.sample_offsets) > 0]] = 0
    return mask


def _is_last_assistant(samples: Samples) -> npt.NDArray[np.bool_]:
    """Say for each message whether it is the last of an assistant in its sample, bool [M]."""
    assistant = np.flatnonzero(samples.message_role == ROLE_ASSISTANT)
    sample_of = np.searchsorted(samples.sample_messages, assistant, side="right") - 1
    result = np.zeros(len(samples.message_role), np.bool_)
    result[assistant[np.diff(sample_of, append=-1) != 0]] = (
        True  # the next one is of another sample
    )
    return result
