"""The part of a micro-batch that one of several ranks runs that share its row
(train/engine/sequence_parallel.py).

row     t0 t1 t2 t3 t4 t5 t6 +      two ranks; + is a filler, a sequence of its own rank 0  t0 t1 t2
t3                 labels are shifted before the row is cut: t3's target t4 is known here rank 1
t4 t5 t6 +
"""

import dataclasses

import torch

from train.data.micro_batch import MicroBatch


def take_slice(batch: MicroBatch, index: int, size: int) -> MicroBatch:
    """Return slice `index` of `size` of a micro-batch: equal numbers of tokens, the bounds of the
    whole row."""
    if size == 1:
        return batch
    num_tokens = batch.input_ids.shape[1]
    length = -(-num_tokens // size)
    filler = length * size - num_tokens
    start, end = index * length, (index + 1) * length
    bounds = batch.cu_seqlens
    if filler:
        bounds = torch.cat([bounds, bounds.new_tensor([length * size])])
    here = torch.nonzero((batch.rows >= start) & (batch.rows < end))[:, 0]
    rows = {
        "rows": batch.rows[here] - start,
        "targets": batch.targets[here],
        "weights": batch.weights[here],
    }
    rows["row_sources"] = batch.row_sources[here]
    uniform = batch.uniform_weight
    if not len(
        here
    ):  # one row of weight 0: a rank that left the head out would leave the others waiting
        rows = {
            "rows": batch.rows.new_zeros(1),
            "targets": batch.targets[:1],
            "weights": batch.weights.new_zeros(1),
        }
        rows["row_sources"] = batch.row_sources.new_zeros(1)
        uniform = 0.0
    return dataclasses.replace(
        batch,
        input_ids=_padded(batch.input_ids, filler)[:, start:end],
        position_ids=torch.cat([batch.position_ids, torch.arange(filler)[None]], dim=1)[
            :, start:end
        ],
        cu_seqlens=bounds,
        max_seqlen=max(batch.max_seqlen, filler),
        uniform_weight=uniform,
        token_share=batch.token_share / size,
        first=start,
        **rows,
    )


def _padded(ids: torch.Tensor, filler: int) -> torch.Tensor:
    return torch.nn.functional.pad(ids, (0, filler))
