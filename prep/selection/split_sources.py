"""A source that is split by a column: each value is a source of its own in the set, with the rows
of the whole.

    source        rows       a a b a c b          one store, tokenised and filtered once
    in the set    a  0 1 3     b  2 5     c  4    row numbers count over the whole source

A row that names no part belongs to the part that is called as its source is. What a part leaves to
the others is counted among its dropped rows, so that every source of a set accounts for all rows
that were read. A ClassLabel of `datasets` is a number in the rows, and so in the names.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from prep.config import SourceConfig
from prep.inputs import Inputs
from prep.selection.sequences import Usable
from prep.sources.resolve import ResolvedSource
from prep.store.sample_store import SampleStore
from prep.store.source_counts import Tally
from shared.errors import DataError
from shared.shard_format import OTHER_PARTS

MAX_PARTS = 1000  # of one source: more are no parts but names of rows

Event = TypeVar("Event", bound=tuple[Any, ...])  # (row, ...)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one source."""

    values: tuple[str, ...]  # in order; "" of rows that have none
    of_row: npt.NDArray[np.int32]  # [R] index into `values` of every row of the source


@dataclass(frozen=True, slots=True)
class SplitSources:
    """The sources of a set: those of its mixture, in order, the split ones part by part."""

    inputs: Inputs
    stores: list[SampleStore]
    tallies: list[Tally]
    parts: list[Parts | None]  # of each source of the mixture; None: it is not split

    def split(self, usables: Sequence[Usable]) -> list[Usable]:
        """Return what can be used of every source of the set, given what can be used of every
        source of the mixture."""
        return [
            one
            for usable, parts in zip(usables, self.parts, strict=True)
            for one in ([usable] if parts is None else _split(usable, parts))
        ]


def split_sources(
    inputs: Inputs, stores: Sequence[SampleStore], tallies: Sequence[Tally]
) -> SplitSources:
    """Return the sources of the set. Raises DataError where `split_by` or `part_epochs` do not fit
    the rows."""
    mixture = inputs.mixture
    found: list[tuple[ResolvedSource, SourceConfig, SampleStore, Tally]] = []
    all_parts: list[Parts | None] = []
    for source, entry, store, tally in zip(
        inputs.sources, mixture.sources, stores, tallies, strict=True
    ):
        parts = _parts_of(store, tally) if entry.split_by else None
        all_parts.append(parts)
        if parts is None:
            found.append((source, entry, store, tally))
            continue
        _check_values(source, entry, tally)
        for value, own in zip(parts.values, _tallies_of(tally, parts), strict=True):
            part = replace(source, name=_name(source, entry, value), part_of=source.name)
            found.append((part, _entry_of(entry, value), store, own))
    mixture = replace(mixture, sources=tuple(entry for _, entry, _, _ in found))
    whole = replace(inputs, mixture=mixture, sources=tuple(source for source, *_ in found))
    return SplitSources(
        whole, [store for _, _, store, _ in found], [tally for *_, tally in found], all_parts
    )


def check_parts(inputs: Inputs, tallies: Sequence[Tally]) -> None:
    """Look at the parts that are known so far. Raises DataError where there are too many or two
    have one name."""
    names = []
    for source, entry, tally in zip(inputs.sources, inputs.mixture.sources, tallies, strict=True):
        names += [
            _name(source, entry, value) for value in (tally.parts if entry.split_by else ("",))
        ]
        if len(tally.parts - {""}) > MAX_PARTS:
            raise DataError(
                f"source {source.name!r}: the column {entry.split_by!r} has more than {MAX_PARTS:,}"
                f" values in its first {tally.rows:,} rows; expected one that names parts: correct"
                " split_by, or remove it"
            )
    if len(set(names)) < len(names):
        twice = next(name for name in sorted(names) if names.count(name) > 1)
        raise DataError(
            f"two sources of the set are called {twice!r}, as split_by finds them; set `name` of a"
            " source that is split: its parts are called NAME/VALUE then"
        )


def warn_of_no_parts(source: ResolvedSource, entry: SourceConfig, tally: Tally) -> None:
    """Say early what would end the build: a column that no row has."""
    if entry.split_by and tally.parts == {""}:
        logger.warning(
            "%s: none of its first %d rows has a value in the column %r that split_by names",
            source.name,
            tally.rows,
            entry.split_by,
        )


def _check_values(source: ResolvedSource, entry: SourceConfig, tally: Tally) -> None:
    if tally.parts == {""} and tally.rows > len(tally.rejects):
        raise DataError(
            f"source {source.name!r}: none of its {tally.rows:,} rows has a value in the column"
            f" {entry.split_by!r}; correct split_by, or remove it"
        )
    unknown = sorted(set(entry.part_epochs) - tally.parts)
    if unknown:
        raise DataError(
            f"source {source.name!r}: part_epochs names {unknown[0]!r}, which no row has in the"
            f" column {entry.split_by!r}; it has {', '.join(map(repr, sorted(tally.parts)))}"
        )


def _name(source: ResolvedSource, entry: SourceConfig, value: str) -> str:
    if not value:
        return source.name
    return f"{entry.name}/{value}" if entry.name else value


def _entry_of(entry: SourceConfig, value: str) -> SourceConfig:
    """Return how the rows of one part are chosen: as those of the whole, unless it is named."""
    if value not in entry.part_epochs:
        return entry
    return replace(entry, fraction=None, epochs=entry.part_epochs[value])


def _parts_of(store: SampleStore, tally: Tally) -> Parts:
    values = sorted(tally.parts) or [""]
    index = {value: number for number, value in enumerate(values)}
    rows = [np.zeros(0, np.int32)]
    for chunk in store.chunks:
        there = np.asarray([index[value] for value in chunk.facts["parts"]], np.int32)
        rows.append(there[chunk.column("row_part")])
    return Parts(tuple(values), np.concatenate(rows))


def _tallies_of(whole: Tally, parts: Parts) -> list[Tally]:
    """Return the tally of every part: its own rejects, and what is only counted of the whole
    source."""
    rejects, uncarried = _by_part(whole.rejects, parts), _by_part(whole.uncarried, parts)
    return [
        replace(whole, rejects=one, uncarried=other)
        for one, other in zip(rejects, uncarried, strict=True)
    ]


def _by_part(events: Sequence[Event], parts: Parts) -> list[list[Event]]:
    """Deal out what begins with a row number."""
    dealt: list[list[Event]] = [[] for _ in parts.values]
    for event in events:
        dealt[parts.of_row[event[0]]].append(event)
    return dealt


def _split(usable: Usable, parts: Parts) -> list[Usable]:
    own_rows = np.bincount(parts.of_row, minlength=len(parts.values))
    part_of = parts.of_row[usable.rows["row"]]
    order = np.argsort(part_of, kind="stable")
    bounds = np.searchsorted(part_of[order], np.arange(len(parts.values) + 1))
    found = []
    for index, events in enumerate(_by_part(usable.listed, parts)):
        dropped = Counter(reason for _, reason, _ in events)
        others = len(parts.of_row) - int(own_rows[index])
        if others:
            dropped[OTHER_PARTS] = others
        found.append(Usable(usable.rows[order[bounds[index] : bounds[index + 1]]], dropped, events))
    return found
