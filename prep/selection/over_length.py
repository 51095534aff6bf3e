"""Over-length policies: which slices of a sample become sequences.

sample          [ a a a a a a a a a a ]           max_seq_len = 4
truncate        [ a a a a ]                       no terminator is added at the cut
truncate_turns  [ a a a ]                         to the end of the last assistant message that fits
drop            nothing
split           [ a a a a ] [ a a a a ] [ a a ]   consecutive fragments
error           the first sample that is too long ends the build
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from prep.store.samples import ROLE_ASSISTANT, Samples, message_ends

Ints = npt.NDArray[np.int64]
OverLength = Literal["truncate", "truncate_turns", "drop", "split", "error"]


@dataclass(frozen=True, slots=True)
class Slices:
    """F slices of S samples, in the order of the samples; length 0 where nothing is left."""

    sample: Ints  # [F]
    first: Ints  # [F] first token within the sample
    length: Ints  # [F] in tokens


def cut(samples: Samples, over_length: OverLength, max_seq_len: int) -> Slices:
    """Return what the policy leaves of each sample.

    A sample that is too long has length 0 under "drop" and "error", and also under "truncate_turns"
    where none of its assistant messages fits.
    """
    full = np.diff(samples.sample_offsets)
    if over_length == "split":
        # As many as it takes, rounded up; an empty sample has one, too.
        fragments = np.maximum(-(-full // max_seq_len), 1)
        sample = np.repeat(np.arange(len(full)), fragments)
        number = np.arange(len(sample)) - np.repeat(np.cumsum(fragments) - fragments, fragments)
        first = number * max_seq_len
        return Slices(sample, first, np.minimum(full[sample] - first, max_seq_len))
    length = np.minimum(full, max_seq_len)
    too_long = full > max_seq_len
    if over_length in ("drop", "error"):
        length[too_long] = 0
    elif over_length == "truncate_turns":
        # Where the last assistant message that fits ends in its sample, 0 where none fits.
        ends = message_ends(samples)
        sample_of = np.searchsorted(samples.sample_messages, np.arange(len(ends)), side="right") - 1
        end_in_sample = ends - samples.sample_offsets[sample_of]
        fits = (samples.message_role == ROLE_ASSISTANT) & (end_in_sample <= max_seq_len)
        last_end = np.zeros(len(full), np.int64)
        np.maximum.at(last_end, sample_of[fits], end_in_sample[fits])
        length[too_long] = last_end[too_long]
    return Slices(np.arange(len(full)), np.zeros(len(full), np.int64), length)
