"""The loss on an evaluation set, over all its loss tokens and for each source.

It is exact for any number of ranks. Dropout is off and no random number is drawn, so training is
bit for bit what it is without evaluation. Every rank runs the same number of forward passes,
because under ZeRO-3 the ranks gather the weights together.
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
        """Return the packs to evaluate, int64: all, or a sample that depends on the set alone."""
        num_packs = self.shard_set.num_packs
        if not self.max_packs or self.max_packs >= num_packs:
            return np.arange(num_packs, dtype=np.int64)
        # The first packs would be no fair sample: the set lists its packs by size.
        key = seed_from("evaluation packs", self.shard_set.manifest.fingerprint)
        return np.sort(permute(np.arange(self.max_packs, dtype=np.int64), num_packs, key))

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield as many as every other rank does; those without a pack hold a filler."""
        groups = self.world_size // self.sequence_parallel
        group, slice_index = divmod(self.rank, self.sequence_parallel)
        ids, size = self.pack_ids(), self.packs_per_micro_batch
        ids_of_group = ids[group::groups]
        # The group with the most packs decides how many micro-batches every rank yields.
        for start in range(0, -(-len(ids) // groups), size):
            batch_ids = ids_of_group[start : start + size]
            packs = [self.shard_set.pack(pack_id) for pack_id in batch_ids.tolist()]
            counts = self.shard_set.loss_tokens(batch_ids).tolist()
            for pack, pack_id, count in zip(packs, batch_ids.tolist(), counts, strict=True):
                check_pack(
                    pack,
                    pack_id,
                    num_loss_tokens=count,
                    max_token_id=self.shard_set.manifest.max_token_id,
                    where=str(self.shard_set.path),
                )
            weights = [np.ones(count, np.float32) for count in counts]
            batch = make_micro_batch(packs, weights, uniform_weight=1.0)
            yield take_slice(batch, slice_index, self.sequence_parallel)


def evaluate(engine: Any, loader: EvalLoader, ranks: Ranks) -> dict[str, Any]:
    """Return the evaluation part of a record of metrics.jsonl, the same on every rank."""
    started = time.perf_counter()
    manifest = loader.shard_set.manifest
    totals = empty_totals(len(manifest.sources), ranks.device)
    engine.eval()
    with torch.no_grad():
        for batch in loader.micro_batches():
            engine(batch.to(ranks.device), totals)
    engine.train()
    losses, tokens = sum_over_ranks(totals, ranks).tolist()
    # Column 0 holds the fillers.
    num_tokens = sum(tokens[1:])
    return {
        "eval_loss": sum(losses[1:]) / num_tokens,
        **means("eval_loss", losses, tokens, manifest),
        "eval_tokens": int(num_tokens),
        "eval_seconds": time.perf_counter() - started,
    }
