"""The rows that are held out of training: all rows of some prompts, so that no question is on both sides.

    side of a row = hash(seed, its prompt) < fraction

Nothing else of the mixture decides: another mix, length, mask, template or order of the sources moves no prompt to the
other side, and what a smaller fraction holds out, a larger one does too.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prep.filters import hashes_of
from prep.sample_store import SampleStore
from prep.selection import Usable, mix
from shared.hashing import seed_from
from shared.shard_format import EVAL_DIR, Manifest

HELD_OUT = "held_out"  # why a row is not in the set itself
_KEPT = "not_held_out"  # why a row is not in the eval set


def mark_held_out(usables: Sequence[Usable], stores: Sequence[SampleStore], *, fraction: float, seed: int) -> None:
    """Set `held_out` of the rows of every source."""
    for usable, store in zip(usables, stores, strict=True):
        prompts = hashes_of(usable, store, "prompt_hash")[:, 0]
        usable.rows["held_out"] = is_held_out(prompts, fraction=fraction, seed=seed)


def hold_out(usables: Sequence[Usable]) -> tuple[list[Usable], list[Usable]]:
    """Return what is left of every source to train on, and what is held out of it."""
    kept, held = [], []
    for usable in usables:
        which = usable.rows["held_out"]
        kept.append(usable.without(which, HELD_OUT, lambda _: f"its prompt is in {EVAL_DIR}/"))
        dropped = usable.dropped.copy()
        num_kept = len(np.unique(usable.rows["row"][~which]))
        if num_kept:
            dropped[_KEPT] = num_kept
        held.append(Usable(usable.rows[which], dropped))
    return kept, held


def is_held_out(prompts: npt.NDArray[np.uint64], *, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return for each prompt hash, uint64 [S], whether it is held out, bool [S]."""
    drawn = mix(prompts ^ np.uint64(seed_from(seed, "held out")))
    return drawn < np.uint64(int(fraction * 2**64))


def num_held_out(manifest: Manifest) -> int:
    """Return how many rows the build of a set held out."""
    return sum(source.rows_dropped.get(HELD_OUT, 0) for source in manifest.sources)
