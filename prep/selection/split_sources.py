"""A source that is split by a column: each value of the column is a source of the set.

    source        rows       a a b a c b          one store, tokenised and filtered once
    in the set    a  0 1 3     b  2 5     c  4    row numbers count over the whole source

A row that names no group belongs to the group with the name of the source. Rows of the other groups
are counted among the dropped rows of a group, so that every source of a set accounts for all rows
that were read. A ClassLabel of `datasets` is a number in the rows, and so in the names.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from prep.selection.sequences import EligibleRows
from prep.selection.source import Source
from shared.errors import DataError
from shared.shard_format import OTHER_GROUPS

MAX_GROUPS = 1000  # of one source: a column with more values names rows, not groups

Event = TypeVar("Event", bound=tuple[Any, ...])  # (row, ...)

logger = logging.getLogger(__name__)


def split_source(source: Source, eligible: EligibleRows) -> list[tuple[Source, EligibleRows]]:
    """Return the groups of a source with the rows of each; a source that is not split is its own.

    Raises DataError where `split_by` or `group_epochs` do not fit the rows.
    """
    config, counts = source.config, source.counts
    if not config.split_by:
        return [(source, eligible)]
    _check_values(source)
    values = sorted(counts.groups) or [""]  # "" is the group of rows that name none
    # Every chunk numbers its groups by itself: row_group is an index into the chunk's list.
    number_of = {value: number for number, value in enumerate(values)}
    groups = [np.zeros(0, np.int32)]
    for chunk in source.samples.chunks:
        of_chunk = np.asarray([number_of[value] for value in chunk.facts["groups"]], np.int32)
        groups.append(of_chunk[chunk.column("row_group")])
    group_of = np.concatenate(groups)  # int32 [R], by row of the source
    num_rows = np.bincount(group_of, minlength=len(values)).tolist()
    rejects = _by_group(counts.rejects, group_of, len(values))
    unrendered = _by_group(counts.unrendered, group_of, len(values))
    listed = _by_group(eligible.listed, group_of, len(values))

    # A stable sort by group keeps the order of the rows within each.
    group_of_sequence = group_of[eligible.rows["row"]]
    num_sequences = np.bincount(group_of_sequence, minlength=len(values))
    by_group = eligible.rows[np.argsort(group_of_sequence, kind="stable")]
    result = []
    for number, rows in enumerate(np.split(by_group, np.cumsum(num_sequences)[:-1])):
        value = values[number]
        group_config = config
        if value in config.group_epochs:
            group_config = replace(config, fraction=None, epochs=config.group_epochs[value])
        group = Source(
            replace(source.resolved, name=_name(source, value), group_of=source.name),
            group_config,
            replace(counts, rejects=rejects[number], unrendered=unrendered[number]),
            source.store,
        )
        # Dropped rows are counted again from the list, which names every one of them.
        dropped = Counter(reason for _, reason, _ in listed[number])
        if others := len(group_of) - num_rows[number]:
            dropped[OTHER_GROUPS] = others
        result.append((group, EligibleRows(rows, dropped, listed[number])))
    return result


def check_groups(sources: Sequence[Source]) -> None:
    """Check the groups that are known so far.

    Raises DataError for too many of them, and for two of one name.
    """
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
        duplicate = next(name for name in sorted(names) if names.count(name) > 1)
        raise DataError(
            f"split_by gives two sources of the set the name {duplicate!r}; set `name` of a source"
            " that is split: its groups are then called NAME/VALUE"
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
    """Raise DataError for a column that no row has, and for epochs of a group that is not there."""
    config, counts = source.config, source.counts
    # Where every row is malformed nothing is known of the column: another check reports those.
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


def _by_group(
    events: Sequence[Event], group_of: npt.NDArray[np.int32], num_groups: int
) -> list[list[Event]]:
    """Sort what begins with a row number into the groups."""
    result: list[list[Event]] = [[] for _ in range(num_groups)]
    for event in events:
        result[group_of[event[0]]].append(event)
    return result
