"""The rows that are held out of training: all rows of some prompts, so that no question is on both
sides.

    a row is held out if hash(seed, its prompt) < fraction

Nothing else of the mixture decides: another mix, length, mask, template or order of the sources
moves no prompt to the other side, and what a smaller fraction holds out, a larger one does too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.selection.filters import hashes_of
from prep.selection.sequences import EligibleRows
from prep.store.sample_store import SampleStore
from shared.hashing import seed_from
from shared.shard_format import EVAL_DIR, Manifest
from shared.splitmix import splitmix64

HELD_OUT = "held_out"  # why a row is not in the set itself
_NOT_HELD_OUT = "not_held_out"  # why a row is not in the eval set


@dataclass(frozen=True, slots=True)
class HeldOutShare:
    """How many of something are held out."""

    held_out: int
    total: int

    @property
    def share(self) -> float:
        return self.held_out / self.total if self.total else 0.0


def mark_eval(
    sources: Sequence[EligibleRows], stores: Sequence[SampleStore], *, fraction: float, seed: int
) -> tuple[HeldOutShare, HeldOutShare]:
    """Set `held_out` of the rows of every source; return the shares of prompts and of rows."""
    hashes, num_held_out, num_rows = [np.zeros(0, np.uint64)], 0, 0
    for eligible, store in zip(sources, stores, strict=True):
        rows, prompts = eligible.rows, hashes_of(eligible, store, "prompt_hash")[:, 0]
        rows["held_out"] = is_held_out(prompts, fraction=fraction, seed=seed)
        hashes.append(prompts)
        # A row that was split has several sequences.
        num_rows += len(np.unique(rows["row"]))
        num_held_out += len(np.unique(rows["row"][rows["held_out"]]))
    # Sources may share prompts: each counts once over all of them.
    prompts = np.unique(np.concatenate(hashes))
    num_prompts = int(is_held_out(prompts, fraction=fraction, seed=seed).sum())
    return HeldOutShare(num_prompts, len(prompts)), HeldOutShare(num_held_out, num_rows)


def split_eval(
    sources: Sequence[EligibleRows],
) -> tuple[list[EligibleRows], list[EligibleRows]]:
    """Return what is left of every source to train on, and what is held out of it."""
    train, held_out = [], []
    for eligible in sources:
        which = eligible.rows["held_out"]
        train.append(eligible.without(which, HELD_OUT, lambda _: f"its prompt is in {EVAL_DIR}/"))
        num_train = len(np.unique(eligible.rows["row"][~which]))
        dropped = eligible.dropped + Counter({_NOT_HELD_OUT: num_train})
        held_out.append(EligibleRows(eligible.rows[which], dropped))
    return train, held_out


def is_held_out(
    prompts: npt.NDArray[np.uint64], *, fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Return for each prompt hash, uint64 [S], whether it is held out, bool [S]."""
    # The hash of a prompt is a uniform 64-bit number, so it falls below a share of the range.
    draw = splitmix64(prompts ^ np.uint64(seed_from(seed, "held out")))
    return draw < np.uint64(int(fraction * 2**64))


def num_held_out(manifest: Manifest) -> int:
    """Return how many rows the build of a set held out."""
    return sum(source.rows_dropped.get(HELD_OUT, 0) for source in manifest.sources)
