"""Samples as the store keeps them: columns, with kinds, messages and their bounds end to end.

kind             U U U A A A A T|U U A A T      two samples, N = 13 tokens
sample_offsets   0               8         13
message_offsets  0     3         8   10         the first token of each message
sample_messages  0               2         4
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

TRAIN_NO, TRAIN_YES, TRAIN_UNSET = 0, 1, 2  # the message_train column
ROLE_ASSISTANT = 3  # the message_role column holds Kind values: this is Kind.ASSISTANT


@dataclass(frozen=True, slots=True)
class Samples:
    """S samples end to end: N tokens, M messages."""

    kind: Bytes  # [N]
    sample_offsets: Ints  # [S+1] in tokens
    sample_messages: Ints  # [S+1] in messages
    message_offsets: Ints  # [M] first token of each message
    message_role: Bytes  # [M]
    message_train: Bytes  # [M]


def message_ends(samples: Samples) -> Ints:
    """Return where each message ends: the index of the token after it, int64 [M]."""
    # A message ends where the next one starts; the last one of a sample ends with the sample, whose
    # successor may have no message.
    num_messages = len(samples.message_offsets)
    ends = np.append(samples.message_offsets[1:], samples.sample_offsets[-1])[:num_messages]
    filled = np.diff(samples.sample_messages) > 0
    ends[samples.sample_messages[1:][filled] - 1] = samples.sample_offsets[1:][filled]
    return ends
