"""What each loss token of a step weighs: numpy on packs, known before the forward pass.

The weights hold the whole normalisation of the loss, so the gradient is the same for any division
of the step into micro-batches.
"""

import numpy as np
import numpy.typing as npt

from shared.shard_reader import Pack
from train.config import LossConfig


def uniform_weight(loss: LossConfig, num_loss_tokens: int) -> float | None:
    """Return the weight that all loss tokens of a step have, or None if they differ (`sample`)."""
    match loss.norm:
        case "token":
            return 1.0 / max(1, num_loss_tokens)
        case "sum":
            return 1.0 / loss.divisor
        case "sample":
            return None


def sample_weights(packs: list[Pack]) -> list[npt.NDArray[np.float32]]:
    """Return the weight of each loss token of each pack of a step, for a mean over samples of their
    means.

    Fragments of one sample count together. A row that the mixture repeats counts once per copy.
    """
    # Loss tokens of each sequence, int64 [S] for each pack.
    counts = [
        np.add.reduceat(pack.loss_mask.astype(np.int64), pack.seq_offsets[:-1]) for pack in packs
    ]
    origin = np.concatenate([pack.seq_origin for pack in packs])  # [S, 3]
    _, sample_of = np.unique(origin[:, :2], axis=0, return_inverse=True)
    sample_of = sample_of.reshape(-1)
    tokens_of = np.bincount(sample_of, np.concatenate(counts))
    # Each copy, unlike a fragment, has a sequence that starts at the sample's first token.
    copies_of = np.maximum(1, np.bincount(sample_of, origin[:, 2] == 0))
    num_samples = max(1.0, copies_of[tokens_of > 0].sum())
    weight_of = copies_of / np.maximum(1, tokens_of) / num_samples
    splits = np.cumsum([len(pack.seq_origin) for pack in packs])[:-1]
    return [
        np.repeat(weight_of[samples], count).astype(np.float32)
        for samples, count in zip(np.split(sample_of, splits), counts, strict=True)
    ]
