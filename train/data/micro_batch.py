"""Packs -> the tensors of one micro-batch: one row without padding, and the positions that carry
loss.

The packs of a micro-batch are laid end to end; sequences stay apart by `cu_seqlens` and restarting
positions.

    tokens         a  b  c  d | e  f  g        two sequences
    loss_mask      0  0  1  1 | 0  1  1        which tokens are targets
    position_ids   0  1  2  3 | 0  1  2
    labels        -1  c  d -1 | f  g -1        shifted here, within each sequence; -1 is IGNORE
    rows              1  2      4  5           positions whose hidden state goes through the head
    targets           c  d      f  g
    cu_seqlens    [0, 4, 7]

A micro-batch without loss tokens still sends one row of weight 0 through the model and the head: a
rank that left them out would leave the others waiting in a collective.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import ChecksumError
from shared.shard_reader import Pack

IGNORE = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What one forward pass takes. N tokens, S sequences, R rows that carry loss."""

    input_ids: torch.Tensor  # int64 [1, N]
    position_ids: torch.Tensor  # int64 [1, N]
    cu_seqlens: torch.Tensor  # int32 [S+1]
    max_seqlen: int
    rows: torch.Tensor  # int64 [R]
    targets: torch.Tensor  # int64 [R]
    weights: torch.Tensor  # float32 [R], of each row in the loss of the step
    row_sources: (
        torch.Tensor
    )  # int64 [R], 1 + the index of the source of each row; 0 for a row that only fills
    uniform_weight: float | None
    """The weight of every row, where they have the same."""
    token_share: float = 0.0
    """Of the tokens of the step that are in this micro-batch."""
    first: int = 0
    """The place in the row, whose bounds `cu_seqlens` holds, of the first token that is here."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro-batch on `device`; the copies do not wait for one another."""
        if device.type == "cpu":
            return self
        return MicroBatch(
            **{
                name: getattr(self, name).pin_memory().to(device, non_blocking=True)
                for name in _TENSORS
            },
            max_seqlen=self.max_seqlen,
            uniform_weight=self.uniform_weight,
            token_share=self.token_share,
            first=self.first,
        )


_TENSORS = ("input_ids", "position_ids", "cu_seqlens", "rows", "targets", "weights", "row_sources")


def make_micro_batch(
    packs: list[Pack], weights: list[npt.NDArray[np.float32]], *, uniform_weight: float | None
) -> MicroBatch:
    """Return the micro-batch of `packs`; `weights` holds, for each pack, one weight per loss token,
    float32 [R]."""
    if not packs:
        return _filler()
    tokens = np.concatenate([pack.tokens for pack in packs]).astype(np.int64)
    cu_seqlens = _join_offsets(packs)  # int64 [S+1]
    labels = shifted_labels(tokens, np.concatenate([pack.loss_mask for pack in packs]), cu_seqlens)
    rows = np.flatnonzero(labels != IGNORE)
    row_weights = np.concatenate(weights)
    assert len(rows) == len(row_weights), (len(rows), len(row_weights))
    targets = labels[rows]
    lengths = np.diff(cu_seqlens)
    sources = np.concatenate([pack.seq_origin[:, 0] for pack in packs])
    row_sources = np.repeat(1 + sources, lengths)[rows]
    if not len(rows):
        rows, targets, row_weights, uniform_weight = (
            np.zeros(1, np.int64),
            tokens[:1],
            np.zeros(1, np.float32),
            0.0,
        )
        row_sources = np.zeros(1, np.int64)
    return MicroBatch(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(restarting_positions(cu_seqlens))[None],
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(row_weights),
        row_sources=torch.from_numpy(row_sources),
        uniform_weight=uniform_weight,
    )


def shifted_labels(
    tokens: npt.NDArray[np.int64],
    loss_mask: npt.NDArray[np.uint8],
    cu_seqlens: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return labels int64 [N]: at each position the next token of the same sequence if it is a
    target, else IGNORE."""
    labels = np.full(len(tokens), IGNORE, np.int64)
    labels[:-1] = np.where(loss_mask[1:] != 0, tokens[1:], IGNORE)
    labels[cu_seqlens[1:] - 1] = IGNORE  # the next token belongs to another sequence
    return labels


def restarting_positions(cu_seqlens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return position ids int64 [N] that count from 0 in each sequence."""
    return np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))


def check_pack(
    pack: Pack, pack_id: int, *, num_loss_tokens: int, max_token_id: int, where: str
) -> None:
    """Raise ChecksumError if the columns of a pack contradict the manifest: damage that the sizes
    do not show.

    Without it a flipped byte would be a wrong denominator, or an index error inside a GPU kernel.
    """
    low, high = int(pack.tokens.min()), int(pack.tokens.max())
    if low < 0 or high > max_token_id:
        wrong = f"holds token {low if low < 0 else high}; expected 0 to {max_token_id}"
    elif (found := int(np.count_nonzero(pack.loss_mask))) != num_loss_tokens:
        wrong = (
            f"has {found} loss tokens in loss_mask.npy and {num_loss_tokens} in"
            " pack_loss_tokens.npy"
        )
    elif pack.loss_mask[pack.seq_offsets[:-1]].any():
        wrong = "trains the first token of a sequence, which nothing can predict"
    else:
        return
    raise ChecksumError(
        f"{where}: pack {pack_id} {wrong}; its bytes have changed, run sft-prep verify on the set"
    )


def _join_offsets(packs: list[Pack]) -> npt.NDArray[np.int64]:
    lengths = np.concatenate([np.diff(pack.seq_offsets) for pack in packs])
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _filler() -> MicroBatch:
    return MicroBatch(
        input_ids=torch.zeros((1, 1), dtype=torch.int64),
        position_ids=torch.zeros((1, 1), dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        max_seqlen=1,
        rows=torch.zeros(1, dtype=torch.int64),
        targets=torch.zeros(1, dtype=torch.int64),
        weights=torch.zeros(1, dtype=torch.float32),
        row_sources=torch.zeros(1, dtype=torch.int64),
        uniform_weight=0.0,
    )
