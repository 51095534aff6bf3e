"""How much data a run has: counted in a shard set, or stated where there is none yet."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared.errors import ConfigError
from shared.shard_format import Totals
from shared.shard_reader import ShardSet

STATED = Path("SHARDS")
"""Stands for the shard set in commands where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatedSizes:
    """The sizes of a shard set that is yet to be built."""

    rows: int
    tokens: int
    loss_tokens: int
    max_seq_len: int

    def __post_init__(self) -> None:
        if not 0 < self.loss_tokens <= self.tokens:
            raise ConfigError(
                f"--loss-tokens {self.loss_tokens}; expected from 1 to --tokens {self.tokens}"
            )
        if self.tokens < self.rows:
            raise ConfigError(f"--tokens {self.tokens} are fewer than --rows {self.rows}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSize:
    totals: Totals
    max_seq_len: int
    squared_lengths: float
    """Sum over all sequences of their length squared: what causal attention costs."""
    assumptions: tuple[str, ...] = field(default=())


def size_of_shard_set(shard_set: ShardSet) -> DataSize:
    """Return the size of a shard set; reads its offsets alone."""
    total = 0
    for columns in shard_set.shards:
        lengths = np.diff(columns["seq_offsets"])
        total += int(np.dot(lengths, lengths))
    manifest = shard_set.manifest
    return DataSize(
        totals=manifest.totals, max_seq_len=manifest.max_seq_len, squared_lengths=float(total)
    )


def size_from_flags(sizes: StatedSizes) -> DataSize:
    """Return the size of a set that does not exist, with what is assumed of it.

    A mean length of m with lengths spread as an exponential distribution has them makes 2 m^2 the
    mean square.
    """
    packs = -(-sizes.tokens // sizes.max_seq_len)
    mean = sizes.tokens / sizes.rows
    return DataSize(
        totals=Totals(
            packs=packs,
            sequences=sizes.rows,
            tokens=sizes.tokens,
            loss_tokens=sizes.loss_tokens,
            density=sizes.tokens / (packs * sizes.max_seq_len),
        ),
        max_seq_len=sizes.max_seq_len,
        squared_lengths=min(2.0 * mean, sizes.max_seq_len) * sizes.tokens,
        assumptions=(
            (
                f"{sizes.rows:,} conversations, {sizes.tokens:,} tokens, {sizes.loss_tokens:,} loss"
                " tokens: as stated"
            ),
            f"full packs of {sizes.max_seq_len:,} tokens, so {packs:,} packs",
            f"lengths spread exponentially around their mean of {mean:,.0f} tokens",
        ),
    )
