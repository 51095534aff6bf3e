"""A source that is split by a column: each value of the column is a source of its own in the set.

    source        rows       a a b a c b          one store, tokenised and filtered once
    in the set    a  0 1 3     b  2 5     c  4    row numbers count over the whole source

A row that names no group belongs to the group with the name of the source. What a group leaves to
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
from prep.selection.sequences import EligibleRows
from prep.selection.source import Source
from prep.store.sample_store import SampleStore
from prep.store.source_counts import SourceCounts
from shared.errors import DataError
from shared.shard_format import OTHER_GROUPS

MAX_GROUPS = 1000  # of one source: a column with more values names rows, not groups

Event = TypeVar("Event", bound=tuple[Any, ...])  # (row, ...)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one source."""

    values: tuple[str, ...]  # in order; "" of rows that name none
    of_row: npt.NDArray[np.int32]  # [R] index into `values` of every row of the source


def split_source(source: Source, eligible: EligibleRows) -> list[tuple[Source, EligibleRows]]:
    """Return the groups of a source with the rows of each; a source that is not split is its own.

    Raises DataError where `split_by` or `group_epochs` do not fit the rows.
    """
    if not source.config.split_by:
        return [(source, eligible)]
    _check_values(source)
    groups = _groups_of(source.samples, source.counts)
    rejects = _by_group(source.counts.rejects, groups)
    unrendered = _by_group(source.counts.unrendered, groups)
    result = []
    for index, rows in enumerate(_split_rows(eligible, groups)):
        value = groups.values[index]
        result.append(
            (
                Source(
                    replace(source.resolved, name=_name(source, value), group_of=source.name),
                    _config_of(source.config, value),
                    replace(source.counts, rejects=rejects[index], unrendered=unrendered[index]),
                    source.store,
                ),
                rows,
            )
        )
    return result


def check_groups(sources: Sequence[Source]) -> None:
    """Check the groups that are known so far. Raises DataError for too many of them, and for two of
    one name."""
    names = []
    for source in sources:
        split_by, values = source.config.split_by, source.counts.groups
        names += [_name(source, value) for value in (values if split_by else ("",))]
        if len(values - {""}) > MAX_GROUPS:
            raise DataError(
                f"source {source.name!r}: the column {split_by!r} has more than {MAX_GROUPS:,}"
                f" values in its first {source.counts.rows:,} rows; expected one that names groups:"
                " correct split_by, or remove it"
            )
    if len(set(names)) < len(names):
        twice = next(name for name in sorted(names) if names.count(name) > 1)
        raise DataError(
            f"split_by gives two sources of the set the name {twice!r}; set `name` of a source that"
            " is split: its groups are then called NAME/VALUE"
        )


def warn_of_no_groups(source: Source) -> None:
    """Warn early of what would end the build: a column that no row has."""
    if source.config.split_by and source.counts.groups == {""}:
        logger.warning(
            "%s: none of its first %d rows has a value in the column %r that split_by names",
            source.name,
            source.counts.rows,
            source.config.split_by,
        )


def _check_values(source: Source) -> None:
    config, counts = source.config, source.counts
    if counts.groups == {""} and counts.rows > len(counts.rejects):
        raise DataError(
            f"source {source.name!r}: none of its {counts.rows:,} rows has a value in the column"
            f" {config.split_by!r}; correct split_by, or remove it"
        )
    unknown = sorted(set(config.group_epochs) - counts.groups)
    if unknown:
        raise DataError(
            f"source {source.name!r}: group_epochs names {unknown[0]!r}, which no row has in the"
            f" column {config.split_by!r}; it has {', '.join(map(repr, sorted(counts.groups)))}"
        )


def _name(source: Source, value: str) -> str:
    if not value:
        return source.name
    return f"{source.config.name}/{value}" if source.config.name else value


def _config_of(config: SourceConfig, value: str) -> SourceConfig:
    """Return how the rows of a group are used: as those of the whole source, unless it is named."""
    if value not in config.group_epochs:
        return config
    return replace(config, fraction=None, epochs=config.group_epochs[value])


def _groups_of(store: SampleStore, counts: SourceCounts) -> Groups:
    values = sorted(counts.groups) or [""]
    index = {value: number for number, value in enumerate(values)}
    rows = [np.zeros(0, np.int32)]
    for chunk in store.chunks:
        of_chunk = np.asarray([index[value] for value in chunk.facts["groups"]], np.int32)
        rows.append(of_chunk[chunk.column("row_group")])
    return Groups(tuple(values), np.concatenate(rows))


def _by_group(events: Sequence[Event], groups: Groups) -> list[list[Event]]:
    """Sort what begins with a row number into the groups."""
    sorted_events: list[list[Event]] = [[] for _ in groups.values]
    for event in events:
        sorted_events[groups.of_row[event[0]]].append(event)
    return sorted_events


def _split_rows(eligible: EligibleRows, groups: Groups) -> list[EligibleRows]:
    num_rows = np.bincount(groups.of_row, minlength=len(groups.values))
    group_of = groups.of_row[eligible.rows["row"]]
    order = np.argsort(group_of, kind="stable")
    bounds = np.searchsorted(group_of[order], np.arange(len(groups.values) + 1))
    result = []
    for index, events in enumerate(_by_group(eligible.listed, groups)):
        dropped = Counter(reason for _, reason, _ in events)
        others = len(groups.of_row) - int(num_rows[index])
        if others:
            dropped[OTHER_GROUPS] = others
        rows = eligible.rows[order[bounds[index] : bounds[index + 1]]]
        result.append(EligibleRows(rows, dropped, events))
    return result
