"""What each source gives to the shard set: filters, then duplicates over all sources, then how much
of what is left.

Filters come first, so that the copy that stays is one that can be used; choosing comes last, so
that `rows = N` means N. Rows are held out before that: the eval set is the same for every mix.
Split sources become their parts in between: nothing before it depends on them.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from prep.config import SourceConfig
from prep.inputs import Inputs
from prep.selection.decontaminate import Overlap
from prep.selection.eval_split import HeldOut, hold_out, mark_held_out
from prep.selection.filters import without_duplicates, without_little_loss, without_overlaps
from prep.selection.sequences import Selection, Usable, choose, usable_rows
from prep.selection.split_sources import SplitSources
from prep.store.sample_store import SampleStore

logger = logging.getLogger(__name__)

_MANY_EPOCHS = 10
_DIGITS = 6  # of the epochs of a source: the last bits of a power differ between machines, these digits do not


@dataclass(frozen=True, slots=True)
class Selections:
    """What every source gives, in order."""

    train: list[Selection]
    held_out: list[Selection]
    """Without a sequence where the mixture holds nothing out."""
    prompts: HeldOut
    rows: HeldOut

    @property
    def num_held_out(self) -> int:
        """The sequences of all sources that are held out."""
        return sum(len(selection.sequences) for selection in self.held_out)


def select_all(
    inputs: Inputs,
    stores: Sequence[SampleStore],
    overlaps: Sequence[Sequence[Overlap]],
    sources: SplitSources,
) -> Selections:
    """Return what every one of `sources` gives, the sources of the set; the others are those of the
    mixture.

    Raises DataError where one cannot give the rows that are asked of it.
    """
    mixture = inputs.mixture
    usables = []
    for source, entry, store, shared in zip(
        inputs.sources, mixture.sources, stores, overlaps, strict=True
    ):
        usable = usable_rows(
            store,
            entry,
            source.name,
            lengths=mixture.lengths,
            mask=mixture.mask,
            max_seq_len=mixture.max_seq_len,
            seed=mixture.seed,
        )
        usable = without_little_loss(usable, entry.min_loss_tokens)
        usables.append(without_overlaps(usable, shared, mixture.decontaminate.ngram))
    if mixture.dedup.exact:
        usables = without_duplicates(usables, stores, [source.name for source in inputs.sources])
    prompts = rows = HeldOut(0, 0)
    if mixture.eval.fraction:
        prompts, rows = mark_held_out(
            usables, stores, fraction=mixture.eval.fraction, seed=mixture.seed
        )
    train, held_out = hold_out(sources.split(usables))
    return Selections(
        _choose_all(train, _entries(sources.inputs, train), sources.inputs),
        _choose_all(held_out, sources.inputs.of_eval_set().mixture.sources, sources.inputs),
        prompts,
        rows,
    )


def _entries(inputs: Inputs, usables: Sequence[Usable]) -> list[SourceConfig]:
    """Return the sources with the epochs that the temperature of the mixture gives them, if it has
    one."""
    mixture = inputs.mixture
    entries = list(mixture.sources)
    if mixture.mixing.temperature is not None:
        tokens = [int(usable.rows["length"].sum(dtype=np.int64)) for usable in usables]
        epochs = epochs_at(mixture.mixing.temperature, tokens)
        for index, (source, times) in enumerate(zip(inputs.sources, epochs, strict=True)):
            if mixture.mixing.max_epochs is None and times > _MANY_EPOCHS:
                logger.warning(
                    "%s is used %.1f times; mixing.max_epochs sets a limit", source.name, times
                )
            times = min(times, mixture.mixing.max_epochs or math.inf)
            entries[index] = replace(entries[index], epochs=times or None)
    return entries


def _choose_all(
    usables: Sequence[Usable], entries: Sequence[SourceConfig], inputs: Inputs
) -> list[Selection]:
    chosen = []
    for usable, entry, source in zip(usables, entries, inputs.sources, strict=True):
        chosen.append(choose(usable, entry, source.name, seed=inputs.mixture.seed))
        if len(usable.rows) and not len(chosen[-1].sequences) and entry.epochs != 0:
            logger.warning(
                "%s: not one of its %d usable sequences is chosen", source.name, len(usable.rows)
            )
    return chosen


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
