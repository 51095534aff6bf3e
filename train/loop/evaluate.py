"""The loss on an evaluation set: over all its loss tokens and for each source, exact for any number
of ranks.

No dropout and no random number is drawn, so that training is bit for bit what it is without
evaluation. Every rank runs as many forward passes as the others: under ZeRO-3 they gather weights
together.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared.hashing import seed_from
from shared.shard_reader import ShardSet
from train.data.micro_batch import MicroBatch, check_pack, make_micro_batch
from train.data.sequence_slice import take_slice
from train.data.step_order import Ids, permute
from train.engine.process_group import Ranks, sum_over_ranks
from train.model.source_loss import empty_totals, means


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalLoader:
    """The micro-batches of one rank over an evaluation set."""

    shard_set: ShardSet
    max_packs: int
    """0 for all."""
    rank: int
    world_size: int
    packs_per_micro_batch: int
    sequence_parallel: int

    def pack_ids(self) -> Ids:
        """Return the packs to evaluate, int64: all, or a sample that only the set decides: packs
        lie sorted by size."""
        num_packs = self.shard_set.num_packs
        if not self.max_packs or self.max_packs >= num_packs:
            return np.arange(num_packs, dtype=np.int64)
        key = seed_from("evaluation packs", self.shard_set.manifest.fingerprint)
        return np.sort(permute(np.arange(self.max_packs, dtype=np.int64), num_packs, key))

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield as many as every other rank does; those without a pack hold a filler."""
        groups = self.world_size // self.sequence_parallel
        group, slice_index = divmod(self.rank, self.sequence_parallel)
        ids, size = self.pack_ids(), self.packs_per_micro_batch
        own = ids[group::groups]
        for start in range(0, -(-len(ids) // groups), size):
            batch = self._micro_batch(own[start : start + size])
            yield take_slice(batch, slice_index, self.sequence_parallel)

    def _micro_batch(self, pack_ids: Ids) -> MicroBatch:
        packs = [self.shard_set.pack(pack_id) for pack_id in pack_ids.tolist()]
        counts = self.shard_set.loss_tokens(pack_ids).tolist()
        for pack, pack_id, count in zip(packs, pack_ids.tolist(), counts, strict=True):
            check_pack(
                pack,
                pack_id,
                num_loss_tokens=count,
                max_token_id=self.shard_set.manifest.max_token_id,
                where=str(self.shard_set.path),
            )
        return make_micro_batch(
            packs, [np.ones(count, np.float32) for count in counts], uniform_weight=1.0
        )


def evaluate(engine: Any, feed: EvalLoader, ranks: Ranks) -> dict[str, Any]:
    """Return the evaluation part of a record of metrics.jsonl, the same on every rank."""
    started = time.perf_counter()
    manifest = feed.shard_set.manifest
    totals = empty_totals(len(manifest.sources), ranks.device)
    engine.eval()
    with torch.no_grad():
        for batch in feed.micro_batches():
            engine(batch.to(ranks.device), totals)
    engine.train()
    losses, tokens = sum_over_ranks(totals, ranks).tolist()
    num_tokens = sum(tokens[1:])
    return {
        "eval_loss": sum(losses[1:]) / num_tokens,
        **means("eval_loss", losses, tokens, manifest),
        "eval_tokens": int(num_tokens),
        "eval_seconds": time.perf_counter() - started,
    }
