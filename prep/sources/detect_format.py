"""Which format the rows of a source have: as stated, or as its first rows show, which the store
remembers.

One source has one format. It is settled before any row is read for good, so that it can be part of
the store's key.
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

_CODE_VERSION = 1  # bump when the same rows would be taken for another format

logger = logging.getLogger(__name__)


def conversion_of(source: ResolvedSource, entry: SourceConfig, store: Path) -> Conversion:
    """Return what the rows of `source` look like. Raises DataError where stated columns fit none of
    its first rows."""
    if entry.format != "auto":
        return Conversion(entry.format, tuple(sorted(entry.columns.items())), entry.split_by)
    return replace(_detected(source, entry, store), split_by=entry.split_by)


def _detected(source: ResolvedSource, entry: SourceConfig, store: Path) -> Conversion:
    key = digest({"source": source.identity(), "columns": entry.columns, "code": _CODE_VERSION})
    memory = store / f"format-{key[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # only a memory
        known = json.loads(memory.read_bytes())
        return Conversion(known["format"], tuple(sorted(known["columns"].items())))
    conversion = _look(source, entry)
    atomic.write_json(memory, {"format": conversion.format, "columns": dict(conversion.columns)})
    return conversion


def _look(source: ResolvedSource, entry: SourceConfig) -> Conversion:
    first = next(iter_chunks(source, source_index=0), None)
    found = detect((record for *_, record in parse_chunk(first)) if first else (), entry.columns)
    if found is not None:
        logger.info("%s: its first rows are %s", source.name, found)
        return found
    if entry.columns and first:
        named = ", ".join(
            f"{field} = {column!r}" for field, column in sorted(entry.columns.items())
        )
        raise DataError(
            f"source {source.name!r}: none of its first rows fits columns {named}; correct them, or"
            " state the format"
        )
    return PLAIN_MESSAGES  # then each row says what it lacks
