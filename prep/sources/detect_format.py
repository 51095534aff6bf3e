"""Decide which format the rows of a source have: as stated, or detected from its first rows.

A source has one format. It is decided before any chunk is built, because it is part of the store's
key. The store remembers what was detected.
"""

import contextlib
import json
import logging
from dataclasses import replace
from pathlib import Path

from prep.config import SourceConfig
from prep.conversations.formats import PLAIN_MESSAGES, Conversion, detect
from prep.sources.chunk import parse_chunk
from prep.sources.reader import iter_chunks
from prep.sources.resolve import ResolvedSource
from shared import atomic
from shared.errors import DataError
from shared.hashing import digest

# bump when the same rows would be taken for another format
_CODE_VERSION = 1

logger = logging.getLogger(__name__)


def conversion_of(source: ResolvedSource, entry: SourceConfig, store: Path) -> Conversion:
    """Return the format of the rows of `source`. Raises DataError if stated columns fit none of the
    first rows."""
    if entry.format != "auto":
        return Conversion(entry.format, tuple(sorted(entry.columns.items())), entry.split_by)
    key = digest({"source": source.identity(), "columns": entry.columns, "code": _CODE_VERSION})
    memory = store / f"format-{key[:32]}.json"
    # Detection can be repeated, so an unreadable memory is no error.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memory.read_bytes())
        columns = dict(known["columns"])
        return Conversion(known["format"], tuple(sorted(columns.items())), entry.split_by)
    first = next(iter_chunks(source, source_index=0), None)
    records = (record for *_, record in parse_chunk(first)) if first else ()
    conversion = detect(records, entry.columns)
    if conversion is not None:
        logger.info("%s: its first rows are %s", source.name, conversion)
    elif entry.columns and first:
        mapping = ", ".join(f"{field} = {name!r}" for field, name in sorted(entry.columns.items()))
        raise DataError(
            f"source {source.name!r}: none of its first rows fits columns {mapping}; correct them,"
            " or state the format"
        )
    else:
        # the error of each row then names what it lacks
        conversion = PLAIN_MESSAGES
    atomic.write_json(memory, {"format": conversion.format, "columns": dict(conversion.columns)})
    return replace(conversion, split_by=entry.split_by)
