"""What each source gives to the shard set, and what is held out of it.

    every source    cut and mask -> its own limits -> overlaps with questions
    all sources     duplicates -> marks of the eval set -> groups of split sources
    every group     epochs by temperature -> rows to train on, rows to evaluate on

Filters come first, so that of two equal rows the one that stays can be used. Choosing comes last,
so that `rows = N` gives N rows. The eval set is marked before that: it is the same for every mix.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from prep.config import MixtureConfig
from prep.selection.decontamination.overlaps import Overlap
from prep.selection.eval_split import HeldOutShare, mark_eval, split_eval
from prep.selection.filters import without_duplicates, without_little_loss, without_overlaps
from prep.selection.sequences import EligibleRows, choose, eligible_sequences
from prep.selection.source import SelectedSource, Source
from prep.selection.split_sources import split_source

logger = logging.getLogger(__name__)

_MANY_EPOCHS = 10
# of the epochs of a source: the last bits of a power differ between machines, these digits do not
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Selections:
    """What every source gives, in order, the groups of split sources one by one."""

    train: list[SelectedSource]
    held_out: list[SelectedSource]
    """Without a sequence where the mixture holds nothing out."""
    prompts: HeldOutShare
    rows: HeldOutShare

    @property
    def num_held_out(self) -> int:
        """The sequences of all sources that are held out."""
        return sum(len(source.selection.sequences) for source in self.held_out)


def select_mixture(
    mixture: MixtureConfig, sources: Sequence[Source], overlaps: Sequence[Sequence[Overlap]]
) -> Selections:
    """Return what every one of `sources` gives.

    `overlaps` are the rows of each source that share a passage with a question. Raises DataError
    where a source cannot give the rows that its configuration asks for.
    """
    # Each source alone: what fits, carries enough loss and repeats no question.
    eligible = []
    for source, shared in zip(sources, overlaps, strict=True):
        rows = eligible_sequences(
            source.samples,
            source.config,
            source.name,
            lengths=mixture.lengths,
            mask=mixture.mask,
            max_seq_len=mixture.max_seq_len,
            seed=mixture.seed,
        )
        rows = without_little_loss(rows, source.config.min_loss_tokens)
        eligible.append(without_overlaps(rows, shared, mixture.decontaminate.ngram))

    # All sources together: a duplicate may lie in another source, and so may a prompt.
    stores = [source.samples for source in sources]
    if mixture.dedup.exact:
        eligible = without_duplicates(eligible, stores, [source.name for source in sources])
    prompt_share = row_share = HeldOutShare(0, 0)
    if mixture.eval.fraction:
        prompt_share, row_share = mark_eval(
            eligible, stores, fraction=mixture.eval.fraction, seed=mixture.seed
        )

    # From here on a split source is its groups. Nothing above depends on how a source is split, so
    # a split changes no row of the set unless its groups are mixed differently.
    groups = [
        group
        for source, rows in zip(sources, eligible, strict=True)
        for group in split_source(source, rows)
    ]
    to_train, to_evaluate = split_eval([rows for _, rows in groups])
    train, held_out = [], []
    for (source, _), epochs, train_rows, eval_rows in zip(
        groups, _epochs(mixture, groups, to_train), to_train, to_evaluate, strict=True
    ):
        # A temperature replaces the epochs of a source. It gives 0 to an empty one: no epochs.
        config = source.config if epochs is None else replace(source.config, epochs=epochs or None)
        selection = choose(train_rows, config, source.name, seed=mixture.seed)
        if len(train_rows.rows) and not len(selection.sequences) and config.epochs != 0:
            logger.warning(
                "%s: not one of its %d eligible sequences is chosen",
                source.name,
                len(train_rows.rows),
            )
        train.append(SelectedSource(source, source.config, selection))
        every_row = replace(source.config, fraction=None, rows=None, epochs=None)
        selection = choose(eval_rows, every_row, source.name, seed=mixture.seed)
        held_out.append(SelectedSource(source, every_row, selection))
    return Selections(train, held_out, prompt_share, row_share)


def epochs_at(temperature: float, tokens: Sequence[int]) -> list[float]:
    """Return how often each source is used so that its share grows with tokens^(1/temperature).

        share_i  = tokens_i^(1/T) / sum_j tokens_j^(1/T)
        epochs_i = share_i * sum_j tokens_j / tokens_i

    The total stays the same. Temperature 1 gives 1 everywhere, a high one equal shares. An empty
    source gets 0, any other at least 10^-6.
    """
    largest = max(tokens, default=0)
    # Relative to the largest source a power is at most 1 and cannot overflow.
    weights = [(count / largest) ** (1 / temperature) if count else 0.0 for count in tokens]
    whole, total = math.fsum(weights), sum(tokens)
    return [
        max(round(weight / whole * total / count, _DIGITS), 10**-_DIGITS) if count else 0.0
        for weight, count in zip(weights, tokens, strict=True)
    ]


def _epochs(
    mixture: MixtureConfig,
    groups: Sequence[tuple[Source, EligibleRows]],
    rows: Sequence[EligibleRows],
) -> list[float | None]:
    """Return the epochs that the temperature of the mixture gives each group; None without one."""
    if mixture.mixing.temperature is None:
        return [None] * len(groups)
    tokens = [int(eligible.rows["length"].sum(dtype=np.int64)) for eligible in rows]
    limit = mixture.mixing.max_epochs
    result: list[float | None] = []
    for (source, _), epochs in zip(
        groups, epochs_at(mixture.mixing.temperature, tokens), strict=True
    ):
        if limit is None and epochs > _MANY_EPOCHS:
            logger.warning(
                "%s is used %.1f times; mixing.max_epochs sets a limit", source.name, epochs
            )
        result.append(min(epochs, limit or math.inf))
    return result
