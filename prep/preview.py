"""Show packs in a terminal: every token's text, who wrote it, whether it is trained, which row it came from.

    -- sequence 0: gsm8k row 17, 24 tokens, 7 trained
       template   | <|user|>\\n
       user       | What is 2+2?
       template   | \\n
                  | <|assistant|>
    +~ assistant  | >\\n\\n          + is trained, ~ also covers bytes outside the text that its kind names
    +  assistant  | The answer is 4.
    +  terminator | <|endoftext|>

The marks say what the colours say, so that a pipe or a log loses nothing.
"""

import json
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from prep.token_text import TokenText, printable
from shared.errors import ConfigError
from shared.shard_format import KIND_MASK, REJECTS_NAME, STRADDLES
from shared.shard_reader import ShardSet

_COLORS = {
    "template": "bright_black",
    "system": "magenta",
    "user": "cyan",
    "assistant": "green",
    "terminator": "yellow",
    "tool_call": "bright_blue",
    "tool": "blue",
    "reasoning": "bright_green",
}
_IDS_PER_LINE = 8


def inspect_lines(
    shard_set: ShardSet,
    *,
    pack: int | None = None,
    row: str | None = None,
    sample: int | None = None,
    color: bool = False,
    ids: bool = False,
) -> Iterator[str]:
    """Yield the lines that show one pack, the sequences of a row (`SOURCE:ROW`), or `sample` packs spread over the set.

    Raises ConfigError for a pack or row that the set does not have, ArtifactError for an unreadable tokenizer.
    """
    if sum(choice is not None for choice in (pack, row, sample)) > 1:
        raise ConfigError("--pack, --row and --sample are given together; give one of them")
    printer = _Printer(shard_set, color=color, ids=ids)
    if row is not None:
        found = _find_row(shard_set, row)
        yield printer.legend()
        for pack_id, sequence in found:
            yield from printer.pack(pack_id, only=sequence)
        return
    if pack is not None and not 0 <= pack < shard_set.num_packs:
        raise ConfigError(f"--pack {pack}: the set has packs 0 to {shard_set.num_packs - 1}")
    count = min(sample or 1, shard_set.num_packs)
    chosen = [pack] if pack is not None else [index * shard_set.num_packs // count for index in range(count)]
    yield printer.legend()
    for pack_id in chosen:
        yield from printer.pack(pack_id)


class _Printer:
    """Turns packs into lines; holds what all lines need."""

    def __init__(self, shard_set: ShardSet, *, color: bool, ids: bool) -> None:
        self._set = shard_set
        self._text = TokenText(shard_set.tokenizer_dir / "tokenizer.json")
        self._names = {number: name for name, number in shard_set.manifest.kinds.items()}
        self._width = max(map(len, self._names.values()), default=0)
        self._color = color
        self._ids = ids

    def legend(self) -> str:
        kinds = " ".join(self._paint(name, name, trained=False) for _, name in sorted(self._names.items()))
        return f"+ trained   ~ also covers bytes outside the text that its kind names   kinds: {kinds}"

    def pack(self, pack_id: int, *, only: int | None = None) -> Iterator[str]:
        pack = self._set.pack(pack_id)
        kinds = self._set.kinds(pack_id)
        yield (
            f"== pack {pack_id} of {self._set.num_packs}: {len(pack.seq_origin)} sequences, {len(pack.tokens)} of "
            f"{self._set.manifest.max_seq_len} tokens, {int(pack.loss_mask.sum(dtype=np.int64))} trained"
        )
        for index, origin in enumerate(pack.seq_origin.tolist()):
            if only is not None and index != only:
                continue
            part = slice(pack.seq_offsets[index], pack.seq_offsets[index + 1])
            yield f"-- sequence {index}: {self._origin(*origin)}, {_counts(pack.loss_mask[part])}"
            yield from self._sequence(pack.tokens[part], kinds[part], pack.loss_mask[part])

    def _origin(self, source: int, row: int, start: int) -> str:
        place = f"{printable(self._set.manifest.sources[source].name.encode())} row {row}"
        return f"{place} from token {start} of its sample" if start else place

    def _sequence(
        self, tokens: npt.NDArray[np.int32], kinds: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8]
    ) -> Iterator[str]:
        """Yield a line for each line of text of each run of tokens that are alike."""
        changes = (np.diff(kinds) != 0) | (np.diff(mask) != 0)
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(tokens)]
        for start, stop in pairwise(bounds):
            kind, trained = int(kinds[start]), bool(mask[start])
            name = self._names.get(kind & KIND_MASK, f"kind {kind & KIND_MASK}")
            run = tokens[start:stop].tolist()
            marks = ("+" if trained else " ") + ("~" if kind & STRADDLES else " ")
            for number, line in enumerate(_split_lines(b"".join(map(self._text.bytes_of, run)))):
                label = name if number == 0 else ""
                yield f"{marks} {label:<{self._width}} | {self._paint(line, name, trained=trained)}"
            if self._ids:
                for first in range(0, len(run), _IDS_PER_LINE):
                    shown = (f"{token} '{self._text.text_of([token])}'" for token in run[first : first + _IDS_PER_LINE])
                    yield f"   {'ids':>{self._width}} : {'  '.join(shown)}"

    def _paint(self, text: str, kind: str, *, trained: bool) -> str:
        if not self._color:
            return text
        from rich.color import ColorSystem
        from rich.style import Style

        style = Style(color=_COLORS.get(kind, "white"), bold=trained, underline=trained)
        return style.render(text, color_system=ColorSystem.STANDARD)


def _split_lines(data: bytes) -> list[str]:
    """Cut behind each newline, which stays visible as an escape."""
    lines = data.split(b"\n")
    texts = [printable(line) + "\\n" for line in lines[:-1]]
    return [*texts, printable(lines[-1])] if lines[-1] or not texts else texts


def _counts(mask: npt.NDArray[np.uint8]) -> str:
    return f"{len(mask)} tokens, {int(mask.sum(dtype=np.int64))} trained"


def _find_row(shard_set: ShardSet, row: str) -> list[tuple[int, int]]:
    """Return (pack, sequence within the pack) of every sequence of a row, in order."""
    name, separator, number = row.rpartition(":")
    names = [source.name for source in shard_set.manifest.sources]
    if not separator or not number.isdecimal() or name not in names:
        raise ConfigError(f"--row {row!r}: expected SOURCE:ROW with a source among {', '.join(names)}")
    found: list[tuple[int, int]] = []
    for first_pack, columns in zip(shard_set.pack_starts, shard_set.shards, strict=True):
        origin = columns["seq_origin"]
        matches = (origin[:, 0] == names.index(name)) & (origin[:, 1] == int(number))
        sequences = np.flatnonzero(matches)
        packs = np.searchsorted(columns["pack_offsets"], sequences, side="right") - 1
        within = sequences - columns["pack_offsets"][packs]
        found += zip((packs + first_pack).tolist(), within.tolist(), strict=True)
    if not found:
        why = _why_left_out(shard_set, name, int(number))
        raise ConfigError(f"--row {row!r}: no sequence of this row is in the set: {why}")
    return found


def _why_left_out(shard_set: ShardSet, name: str, row: int) -> str:
    """Return what the build's list of left-out rows says of a row."""
    import zstandard

    try:
        data = (shard_set.path / REJECTS_NAME).read_bytes()
    except FileNotFoundError:
        return f"the source has {_rows_read(shard_set, name)} rows, and {REJECTS_NAME} is not there to say why"
    for line in zstandard.ZstdDecompressor().stream_reader(data).read().split(b"\n"):
        if line and (event := json.loads(line))["source"] == name and event["row"] == row:
            return printable(f"{event['reason']}: {event['detail']}".encode())
    return f"the source has rows 0 to {_rows_read(shard_set, name) - 1}, and this one was not chosen"


def _rows_read(shard_set: ShardSet, name: str) -> int:
    return next(source.rows_read for source in shard_set.manifest.sources if source.name == name)
