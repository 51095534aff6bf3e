"""The slice of a micro-batch that one rank runs if several share its row
(train/engine/sequence_parallel.py).

    row     t0 t1 t2 t3 t4 t5 t6 +     two ranks; + is a filler in a separate sequence
    rank 0  t0 t1 t2 t3                labels were shifted before the cut, so t3 has its target t4
    rank 1              t4 t5 t6 +
"""

import dataclasses

import torch
from torch.nn.functional import pad

from train.data.micro_batch import MicroBatch


def take_slice(batch: MicroBatch, index: int, size: int) -> MicroBatch:
    """Return slice `index` of `size` equal slices of a micro-batch, with the bounds of the whole
    row."""
    if size == 1:
        return batch
    num_tokens = batch.input_ids.shape[1]
    length = -(-num_tokens // size)
    filler = length * size - num_tokens
    start, end = index * length, (index + 1) * length
    bounds = batch.cu_seqlens
    if filler:
        bounds = torch.cat([bounds, bounds.new_tensor([length * size])])
    position_ids = torch.cat([batch.position_ids, torch.arange(filler)[None]], dim=1)
    inside = torch.nonzero((batch.rows >= start) & (batch.rows < end))[:, 0]
    rows = {
        "rows": batch.rows[inside] - start,
        "targets": batch.targets[inside],
        "weights": batch.weights[inside],
        "row_sources": batch.row_sources[inside],
    }
    if not len(inside):
        # One row of weight 0: a rank that skipped the head would leave the others waiting.
        rows = {
            "rows": batch.rows.new_zeros(1),
            "targets": batch.targets[:1],
            "weights": batch.weights.new_zeros(1),
            "row_sources": batch.row_sources.new_zeros(1),
        }
    return dataclasses.replace(
        batch,
        input_ids=pad(batch.input_ids, (0, filler))[:, start:end],
        position_ids=position_ids[:, start:end],
        cu_seqlens=bounds,
        max_seqlen=max(batch.max_seqlen, filler),
        uniform_weight=batch.uniform_weight if len(inside) else 0.0,
        token_share=batch.token_share / size,
        first=start,
        **rows,
    )
