"""The source rows of a step by name, for errors, warnings and people. Reads shards, never
tokens."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.shard_format import Manifest
from train.data.step_plan import StepPlan, origins

_SHOWN = 8


def step_rows(plan: StepPlan, manifest: Manifest) -> list[str]:
    """Return every row of a step as SOURCE:ROW, each once, in the order in which ranks run them."""
    return name_rows(np.concatenate(origins(plan)), manifest)


def micro_batch_rows(plan: StepPlan, group: int, number: int, manifest: Manifest) -> list[str]:
    """Return the rows of micro-batch `number` of `group`: a rank, or the ranks that share rows."""
    positions = plan.ranks[group][number]
    return [
        row
        for position in positions
        for row in name_rows(plan.packs[position].seq_origin, manifest)
    ]


def name_rows(origin: npt.NDArray[np.int64], manifest: Manifest) -> list[str]:
    """Return the rows of `origin` [S, 3] as SOURCE:ROW, as sft-prep inspect takes them, each
    once."""
    named = (f"{manifest.sources[source].name}:{row}" for source, row, _ in origin.tolist())
    return list(dict.fromkeys(named))


def first_few(names: Sequence[str]) -> str:
    """Return the first few of `names` and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
