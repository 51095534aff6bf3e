"""Packs -> the tensors of one micro-batch: one row without padding, and the positions with a loss.

The packs of a micro-batch are laid end to end; `cu_seqlens` and positions that restart at 0 keep
their sequences apart.

    tokens         a  b  c  d | e  f  g        two sequences
    loss_mask      0  0  1  1 | 0  1  1        which tokens are targets
    position_ids   0  1  2  3 | 0  1  2
    labels        -1  c  d -1 | f  g -1        shifted within each sequence; -1 stands for IGNORE
    rows              1  2      4  5           positions whose hidden state goes through the head
    targets           c  d      f  g
    cu_seqlens    [0, 4, 7]

A micro-batch without loss tokens still sends one row of weight 0 through the model and the head: a
rank that skipped them would leave the others waiting in a collective.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import ChecksumError
from shared.shard_reader import Pack

IGNORE = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The input of one forward pass: N tokens, S sequences, R rows with a loss."""

    input_ids: torch.Tensor  # int64 [1, N]
    position_ids: torch.Tensor  # int64 [1, N]
    cu_seqlens: torch.Tensor  # int32 [S+1]
    max_seqlen: int
    rows: torch.Tensor  # int64 [R]
    targets: torch.Tensor  # int64 [R]
    weights: torch.Tensor  # float32 [R], of each row in the loss of the step
    row_sources: torch.Tensor  # int64 [R], 1 + index of the source of each row; 0 for a filler
    uniform_weight: float | None
    """The weight of every row, if all have the same."""
    token_share: float = 0.0
    """The share of the step's tokens that this micro-batch holds."""
    first: int = 0
    """The position of the first token of this slice in the row whose bounds `cu_seqlens` holds."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro-batch on `device`; the copies do not wait for one another."""
        if device.type == "cpu":
            return self
        tensors: dict[str, torch.Tensor] = {
            name: getattr(self, name).pin_memory().to(device, non_blocking=True)
            for name in _TENSORS
        }
        return replace(self, **tensors)  # type: ignore[arg-type]


_TENSORS = ("input_ids", "position_ids", "cu_seqlens", "rows", "targets", "weights", "row_sources")

# What a rank runs that gets no pack: one token without a target.
_FILLER = Pack(
    tokens=np.zeros(1, np.int32),
    loss_mask=np.zeros(1, np.uint8),
    seq_offsets=np.array([0, 1], np.int64),
    seq_origin=np.zeros((1, 3), np.int64),
)


def make_micro_batch(
    packs: list[Pack], weights: list[npt.NDArray[np.float32]], *, uniform_weight: float | None
) -> MicroBatch:
    """Return the micro-batch of `packs`; `weights` holds, for each pack, one weight per loss token,
    float32 [R]."""
    if not packs:
        packs, weights = [_FILLER], [np.empty(0, np.float32)]
    tokens = np.concatenate([pack.tokens for pack in packs]).astype(np.int64)
    lengths = np.concatenate([np.diff(pack.seq_offsets) for pack in packs])
    cu_seqlens = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    labels = shifted_labels(tokens, np.concatenate([pack.loss_mask for pack in packs]), cu_seqlens)
    rows = np.flatnonzero(labels != IGNORE)
    row_weights = np.concatenate(weights)
    assert len(rows) == len(row_weights), (len(rows), len(row_weights))
    targets = labels[rows]
    sources = np.concatenate([pack.seq_origin[:, 0] for pack in packs])
    row_sources = np.repeat(1 + sources, lengths)[rows]
    if not len(rows):
        # One row of weight 0 that belongs to no source, so that this rank, too, calls the head.
        rows, targets, row_sources = np.zeros(1, np.int64), tokens[:1], np.zeros(1, np.int64)
        row_weights, uniform_weight = np.zeros(1, np.float32), 0.0
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
    """Return labels int64 [N]: at each position the next token of its sequence if that is a target,
    else IGNORE."""
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
    """Raise ChecksumError if the columns of a pack contradict the manifest: damage that does not
    show in file sizes.

    Unchecked, a flipped byte would become a wrong denominator or an index error in a GPU kernel.
    """
    low, high = int(pack.tokens.min()), int(pack.tokens.max())
    num_ones = int(np.count_nonzero(pack.loss_mask))
    if low < 0 or high > max_token_id:
        wrong = f"holds token {low if low < 0 else high}; expected 0 to {max_token_id}"
    elif num_ones != num_loss_tokens:
        wrong = (
            f"has {num_ones} loss tokens in loss_mask.npy and {num_loss_tokens} in"
            " pack_loss_tokens.npy"
        )
    elif pack.loss_mask[pack.seq_offsets[:-1]].any():
        wrong = "trains the first token of a sequence, which nothing can predict"
    else:
        return
    raise ChecksumError(
        f"{where}: pack {pack_id} {wrong}; its bytes have changed; run sft-prep verify on the set"
    )
