"""Which packs and sequences to show, and what the set records of each: its row, its place in it.

SOURCE:ROW  ->  [(pack, sequence within the pack), ...]
--pack N    ->  [(N, None)]: the whole pack
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.inspection.token_text import printable
from shared.errors import ConfigError
from shared.shard_format import REJECTS_NAME
from shared.shard_reader import ShardSet

Locations = list[tuple[int, int | None]]


@dataclass(frozen=True, slots=True)
class ShownSequence:
    """One sequence of a pack, with the columns that people look at."""

    index: int
    source_index: int
    source: str  # printable
    row: int
    start: int  # position of its first token within the sample
    tokens: npt.NDArray[np.int32]  # [T]
    kinds: npt.NDArray[np.uint8]  # [T]
    loss_mask: npt.NDArray[np.uint8]  # [T]

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum(dtype=np.int64))


def locate_sequences(
    shard_set: ShardSet,
    *,
    pack: int | None = None,
    row: str | None = None,
    sample: int | None = None,
) -> Locations:
    """Return (pack, sequence) pairs of one pack, of a row (`SOURCE:ROW`), or of `sample` packs
    spread over the set.

    None in place of a sequence means the whole pack. Raises ConfigError for a pack or row that the
    set does not have.
    """
    if sum(choice is not None for choice in (pack, row, sample)) > 1:
        raise ConfigError("--pack, --row and --sample are given together; give one of them")
    if pack is not None:
        if not 0 <= pack < shard_set.num_packs:
            raise ConfigError(f"--pack {pack}: the set has packs 0 to {shard_set.num_packs - 1}")
        return [(pack, None)]
    if row is None:
        # Without any choice, one pack: the first.
        count = min(sample or 1, shard_set.num_packs)
        return [(index * shard_set.num_packs // count, None) for index in range(count)]
    name, separator, number = row.rpartition(":")
    names = [source.name for source in shard_set.manifest.sources]
    if not separator or not number.isdecimal() or name not in names:
        raise ConfigError(
            f"--row {row!r}: expected SOURCE:ROW with a source among {', '.join(names)}"
        )
    locations = _sequences_of(shard_set, names.index(name), int(number))
    if not locations:
        reason = _why_left_out(shard_set, name, int(number))
        raise ConfigError(f"--row {row!r}: no sequence of this row is in the set: {reason}")
    return locations


def sequences_of(shard_set: ShardSet, pack_id: int) -> Iterator[ShownSequence]:
    """Yield the sequences of a pack, in order."""
    pack, kinds = shard_set.pack(pack_id), shard_set.kinds(pack_id)
    for index, (source, row, start) in enumerate(pack.seq_origin.tolist()):
        bounds = slice(pack.seq_offsets[index], pack.seq_offsets[index + 1])
        name = printable(shard_set.manifest.sources[source].name.encode())
        tokens, mask = pack.tokens[bounds], pack.loss_mask[bounds]
        yield ShownSequence(index, source, name, row, start, tokens, kinds[bounds], mask)


def describe_truncation(
    shard_set: ShardSet, sequences: list[ShownSequence]
) -> dict[tuple[int, int, int], str]:
    """Return what became of the samples that are not whole: they were cut, or split into fragments.

    Keys are (source index, row, start).
    """
    rows_shown = {(sequence.source_index, sequence.row) for sequence in sequences}
    names = [source.name for source in shard_set.manifest.sources]
    events = {
        (names.index(event["source"]), event["row"]): printable(
            f"{event['reason']}: {event['detail']}".encode()
        )
        for event in left_out_events(shard_set)
        if event["source"] in names and (names.index(event["source"]), event["row"]) in rows_shown
    }
    # Where the fragments of each row begin; a whole sample begins at 0 alone.
    starts: dict[tuple[int, int], set[int]] = {origin: set() for origin in rows_shown}
    numbers = np.array(sorted({row for _, row in rows_shown}), np.int64)
    for columns in shard_set.shards:
        origins = columns["seq_origin"]
        for source, row, start in origins[np.isin(origins[:, 1], numbers)].tolist():
            if (source, row) in starts:
                starts[source, row].add(start)
    notes = {}
    for sequence in sequences:
        origin = (sequence.source_index, sequence.row)
        words = [events[origin]] if origin in events else []
        fragments = sorted(starts[origin])
        if len(fragments) > 1 or sequence.start:
            last = sequence.start + len(sequence.tokens) - 1
            fragment = f"fragment {fragments.index(sequence.start) + 1} of {len(fragments)}"
            words.append(f"{fragment}: tokens {sequence.start:,} to {last:,} of its sample")
        if words:
            notes[(*origin, sequence.start)] = "; ".join(words)
    return notes


def left_out_events(shard_set: ShardSet) -> Iterator[dict[str, str | int]]:
    """Yield what the build listed of rows that it left out or cut; nothing without that list."""
    import zstandard

    try:
        data = (shard_set.path / REJECTS_NAME).read_bytes()
    except FileNotFoundError:
        return
    for line in zstandard.ZstdDecompressor().stream_reader(data).read().split(b"\n"):
        if line:
            yield json.loads(line)


def _sequences_of(shard_set: ShardSet, source: int, row: int) -> Locations:
    """Return (pack, sequence within the pack) of every sequence of a row, in order."""
    locations: Locations = []
    for first_pack, columns in zip(shard_set.pack_starts, shard_set.shards, strict=True):
        origin = columns["seq_origin"]
        sequences = np.flatnonzero((origin[:, 0] == source) & (origin[:, 1] == row))
        packs = np.searchsorted(columns["pack_offsets"], sequences, side="right") - 1
        within = sequences - columns["pack_offsets"][packs]
        # A row may have several sequences: fragments, or repeats.
        locations += zip((packs + first_pack).tolist(), within.tolist(), strict=True)
    return locations


def _why_left_out(shard_set: ShardSet, name: str, row: int) -> str:
    """Return the reason that the build listed for a row, or the group of its source that has it."""
    sources = shard_set.manifest.sources
    entry = next(source for source in sources if source.name == name)
    whole = entry.details.get("group_of")
    events: dict[str | int, dict[str, str | int]] = {}
    for event in left_out_events(shard_set):
        if event["row"] == row:
            events.setdefault(event["source"], event)
    # The groups of a split source share row numbers, so the row may be in another of them.
    for index, source in enumerate(sources):
        is_sibling = whole and source.details.get("group_of") == whole and source.name != name
        if is_sibling and (source.name in events or _sequences_of(shard_set, index, row)):
            hint = f"it is in {source.name}, another group of {whole}: --row {source.name}:{row}"
            return printable(hint.encode())
    if name in events:
        return printable(f"{events[name]['reason']}: {events[name]['detail']}".encode())
    if not (shard_set.path / REJECTS_NAME).is_file():
        return f"the source has {entry.rows_read} rows; {REJECTS_NAME}, which says why, is missing"
    other = f", or is of another group of {printable(whole.encode())}" if whole else ""
    return f"the source has rows 0 to {entry.rows_read - 1}, and this one was not chosen{other}"
