"""The rows that are held out of training: all rows of some prompts, so that no question is on both
sides.

    side of a row = hash(seed, its prompt) < fraction

Nothing else of the mixture decides: another mix, length, mask, template or order of the sources
moves no prompt to the other side, and what a smaller fraction holds out, a larger one does too.
"""

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
_KEPT = "not_held_out"  # why a row is not in the eval set


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How many of something are held out."""

    held_out: int
    total: int

    @property
    def share(self) -> float:
        return self.held_out / self.total if self.total else 0.0


def mark_eval(
    usables: Sequence[EligibleRows], stores: Sequence[SampleStore], *, fraction: float, seed: int
) -> tuple[HeldOut, HeldOut]:
    """Set `held_out` of the rows of every source. Return how many different prompts it is true of,
    and rows."""
    all_prompts, held_rows, num_rows = [np.zeros(0, np.uint64)], 0, 0
    for usable, store in zip(usables, stores, strict=True):
        prompts = hashes_of(usable, store, "prompt_hash")[:, 0]
        held = is_held_out(prompts, fraction=fraction, seed=seed)
        usable.rows["held_out"] = held
        all_prompts.append(prompts)
        num_rows += len(np.unique(usable.rows["row"]))
        held_rows += len(np.unique(usable.rows["row"][held]))
    prompts = np.unique(np.concatenate(all_prompts))
    num_held = int(is_held_out(prompts, fraction=fraction, seed=seed).sum())
    return HeldOut(num_held, len(prompts)), HeldOut(held_rows, num_rows)


def split_eval(usables: Sequence[EligibleRows]) -> tuple[list[EligibleRows], list[EligibleRows]]:
    """Return what is left of every source to train on, and what is held out of it."""
    kept, held = [], []
    for usable in usables:
        which = usable.rows["held_out"]
        kept.append(usable.without(which, HELD_OUT, lambda _: f"its prompt is in {EVAL_DIR}/"))
        dropped = usable.dropped.copy()
        num_kept = len(np.unique(usable.rows["row"][~which]))
        if num_kept:
            dropped[_KEPT] = num_kept
        held.append(EligibleRows(usable.rows[which], dropped))
    return kept, held


def is_held_out(
    prompts: npt.NDArray[np.uint64], *, fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Return for each prompt hash, uint64 [S], whether it is held out, bool [S]."""
    drawn = splitmix64(prompts ^ np.uint64(seed_from(seed, "held out")))
    return drawn < np.uint64(int(fraction * 2**64))


def num_held_out(manifest: Manifest) -> int:
    """Return how many rows the build of a set held out."""
    return sum(source.rows_dropped.get(HELD_OUT, 0) for source in manifest.sources)
