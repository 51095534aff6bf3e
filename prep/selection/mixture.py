"""What each source gives to the shard set: filters, duplicates over all sources, then how much.

Filters come first, so that the copy that stays is one that can be used; choosing comes last, so
that `rows = N` means N. Rows are held out before that: the eval set is the same for every mix.
Split sources become their groups in between: nothing before that depends on them.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from prep.config import MixtureConfig
from prep.selection.decontaminate import Overlap
from prep.selection.eval_split import HeldOut, mark_eval, split_eval
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
    prompts: HeldOut
    rows: HeldOut

    @property
    def num_held_out(self) -> int:
        """The sequences of all sources that are held out."""
        return sum(len(source.selection.sequences) for source in self.held_out)


def select_mixture(
    mixture: MixtureConfig, sources: Sequence[Source], overlaps: Sequence[Sequence[Overlap]]
) -> Selections:
    """Return what every one of `sources` gives; `overlaps` are the rows of each that share a
    passage with a question.

    Raises DataError where a source cannot give the rows that its configuration asks for.
    """
    stores, names = [source.samples for source in sources], [source.name for source in sources]
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
    if mixture.dedup.exact:
        eligible = without_duplicates(eligible, stores, names)
    prompts = held_rows = HeldOut(0, 0)
    if mixture.eval.fraction:
        prompts, held_rows = mark_eval(
            eligible, stores, fraction=mixture.eval.fraction, seed=mixture.seed
        )
    groups = [
        group
        for source, rows in zip(sources, eligible, strict=True)
        for group in split_source(source, rows)
    ]
    kept, held = split_eval([rows for _, rows in groups])
    train, held_out = [], []
    for (source, _), epochs, train_rows, eval_rows in zip(
        groups, _epochs(mixture, groups, kept), kept, held, strict=True
    ):
        config = source.config if epochs is None else replace(source.config, epochs=epochs or None)
        whole = replace(source.config, fraction=None, rows=None, epochs=None)
        selection = choose(train_rows, config, source.name, seed=mixture.seed)
        if len(train_rows.rows) and not len(selection.sequences) and config.epochs != 0:
            logger.warning(
                "%s: not one of its %d eligible sequences is chosen",
                source.name,
                len(train_rows.rows),
            )
        train.append(SelectedSource(source, source.config, selection))
        held_out.append(
            SelectedSource(source, whole, choose(eval_rows, whole, source.name, seed=mixture.seed))
        )
    return Selections(train, held_out, prompts, held_rows)


def _epochs(
    mixture: MixtureConfig,
    groups: Sequence[tuple[Source, EligibleRows]],
    kept: Sequence[EligibleRows],
) -> list[float | None]:
    """Return the epochs that the temperature of the mixture gives each group; None without one."""
    if mixture.mixing.temperature is None:
        return [None] * len(groups)
    tokens = [int(rows.rows["length"].sum(dtype=np.int64)) for rows in kept]
    result: list[float | None] = []
    for (source, _), epochs in zip(
        groups, epochs_at(mixture.mixing.temperature, tokens), strict=True
    ):
        if mixture.mixing.max_epochs is None and epochs > _MANY_EPOCHS:
            logger.warning(
                "%s is used %.1f times; mixing.max_epochs sets a limit", source.name, epochs
            )
        result.append(min(epochs, mixture.mixing.max_epochs or math.inf))
    return result


def epochs_at(temperature: float, tokens: Sequence[int]) -> list[float]:
    """Return how often each source is used, so that its share grows with tokens^(1/temperature),
    the total unchanged.

    share_i = tokens_i^(1/T) / sum_j tokens_j^(1/T)        epochs_i = share_i * sum_j tokens_j /
    tokens_i

    Temperature 1 gives 1 everywhere, a high one equal shares. An empty source gets 0.
    """
    most = max(tokens, default=0)
    weights = [
        (count / most) ** (1 / temperature) if count else 0.0 for count in tokens
    ]  # at most 1: no overflow
    whole, total = math.fsum(weights), sum(tokens)
    return [
        max(round(weight / whole * total / count, _DIGITS), 10**-_DIGITS) if count else 0.0
        for weight, count in zip(weights, tokens, strict=True)
    ]
