"""How unevenly the ranks work in a step, before and after `assign_micro_batches`, on the lengths of
real conversations.

Cost is that of train/data/balance.py: per sequence its length squared plus 32,768 per token. Ranks
wait for one another at every micro-batch under ZeRO-3 (the first figures: sum over micro-batches of
the most loaded rank / sum of the mean rank), and at the end of the step under ZeRO-1 and 2 (then:
most loaded rank / mean rank). 1.000 is no waiting. The last figure is the least that any division
can reach: the costliest pack or conversation cannot be divided.

    packs          before: in the order of the plan, round-robin
    conversations  before: unpacked, one per micro-batch, round-robin, as in trainers without
                   packing

    python tests/bench/bench_balance.py [--shards DIR | --conversations GLOB --tokenizer DIR]
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep.build.build import build
from prep.build.request import BuildRequest
from prep.config import MixtureConfig
from shared import config
from shared.shard_reader import ShardSet, open_shard_set
from train.data.balance import costs_of
from train.data.step_order import StepOrder, Unit, make_order
from train.data.step_plan import StepPlan, plan_step

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
EPOCHS = 4
# [num_micro_batches, world_size]
Costs = npt.NDArray[np.float64]


def build_set(conversations: str, tokenizer: str, folder: Path) -> Path:
    pattern = Path(conversations)
    files = sorted(pattern.parent.glob(pattern.name))
    if not files:
        sys.exit(
            f"no conversations at {conversations}: give --conversations and --tokenizer, or"
            " --shards"
        )
    tables = {
        "name": "real",
        "max_seq_len": 4096,
        "tokenizer": {"name": tokenizer},
        "template": {"name": "tulu", "add_bos": True},
        "rows": {"max_unrendered": 1.0},
        "sources": [{"path": str(file)} for file in files],
    }
    mixture = config.build(MixtureConfig, tables, "bench")
    build(BuildRequest(mixture, folder, folder / "set", folder / "store", 2, False), rebuild=False)
    return folder / "set"


def order_of(shard_set: ShardSet, unit: Unit, per_step: int) -> StepOrder:
    num_units = shard_set.num_packs if unit == "pack" else shard_set.num_sequences
    return make_order(
        unit=unit,
        fingerprint=shard_set.manifest.fingerprint,
        seed=0,
        num_units=num_units,
        units_per_step=per_step,
        epochs=EPOCHS,
        max_steps=None,
    )


def whole_steps(shard_set: ShardSet, order: StepOrder, world_size: int) -> Iterator[StepPlan]:
    # The last step is short.
    for step in range(order.total_steps - 1):
        yield plan_step(shard_set, order, step, world_size=world_size, packs_per_micro_batch=1)


def before(plan: StepPlan, world_size: int) -> Costs:
    costs = costs_of(plan.lengths)
    padded = np.zeros(-(-len(costs) // world_size) * world_size)
    padded[: len(costs)] = costs
    return padded.reshape(-1, world_size)


def after(plan: StepPlan) -> Costs:
    costs = costs_of(plan.lengths)
    return np.array(
        [[costs[positions].sum() for positions in rank] for rank in plan.ranks], np.float64
    ).T


def imbalance(steps: list[Costs]) -> tuple[float, float]:
    """Return most loaded / mean rank over all steps: waiting at every micro-batch, and waiting at
    the end of a step."""
    mean = sum(costs.mean(axis=1).sum() for costs in steps)
    at_micro_batches = sum(costs.max(axis=1).sum() for costs in steps)
    at_steps = sum(costs.sum(axis=0).max() for costs in steps)
    return at_micro_batches / mean, at_steps / mean


def least(plans: list[StepPlan], world_size: int) -> float:
    """Return costliest unit / mean rank over all steps, counting 1 for steps where it is less."""
    costs = [costs_of(plan.lengths) for plan in plans]
    means = [cost.sum() / world_size for cost in costs]
    return float(
        sum(max(cost.max(), mean) for cost, mean in zip(costs, means, strict=True)) / sum(means)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--conversations", default=str(DATA / "conversations" / "*.jsonl.gz"))
    parser.add_argument("--tokenizer", default=str(DATA / "tokenizers" / "olmo2-dolma2"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shard_set = open_shard_set(
            options.shards or build_set(options.conversations, options.tokenizer, Path(name))
        )
        totals = shard_set.manifest.totals
        print(
            f"{totals.sequences:,} conversations, {totals.tokens:,} tokens, {totals.packs:,} packs"
            f" of {shard_set.manifest.max_seq_len:,}\n"
        )
        figures = "waiting at each, before | after | waiting at the end, before | after | least"
        print(f"| step | ranks | micro-batches | {figures} |")
        print("|---|---|---|---|---|---|---|---|")
        for unit, world_size, per_step in (
            ("pack", 8, 32), ("pack", 16, 64), ("pack", 64, 256),
            ("conversation", 8, 128), ("conversation", 16, 128), ("conversation", 64, 256),
        ):  # fmt: skip
            plans = list(whole_steps(shard_set, order_of(shard_set, unit, per_step), world_size))
            old, new = [before(plan, world_size) for plan in plans], [after(plan) for plan in plans]
            (old_each, old_end), (new_each, new_end) = imbalance(old), imbalance(new)
            counts = [sum(map(len, costs)) / len(costs) for costs in (old, new)]
            print(
                f"| {per_step} {unit}s | {world_size} | {counts[0]:.1f} -> {counts[1]:.1f} |"
                f" {old_each:.3f} | {new_each:.3f} | {old_end:.3f} | {new_end:.3f} |"
                f" {least(plans, world_size):.3f} |"
            )


if __name__ == "__main__":
    main()
