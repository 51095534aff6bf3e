"""Show packs in a terminal: every token's text, its author, whether it is trained, its row.

    -- sequence 0: gsm8k row 17, 24 tokens, 7 trained
       template   | <|user|>\\n
       user       | What is 2+2?
       template   | \\n
                  | <|assistant|>
    +~ assistant  | >\\n\\n          + is trained, ~ also covers bytes of another kind
    +  assistant  | The answer is 4.
    +  terminator | <|endoftext|>

The marks repeat what the colours show, so that a pipe or a log loses nothing.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from prep.inspection.locate import ShownSequence, locate_sequences, sequences_of
from prep.inspection.token_text import TokenText, printable
from shared.shard_format import KIND_MASK, STRADDLES
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
_LINE = re.compile(rb"[^\n]*\n|[^\n]+")


def inspect_lines(
    shard_set: ShardSet,
    *,
    pack: int | None = None,
    row: str | None = None,
    sample: int | None = None,
    color: bool = False,
    ids: bool = False,
) -> Iterator[str]:
    """Yield the lines that show one pack, the sequences of a row (`SOURCE:ROW`), or `sample` packs
    spread over the set.

    Raises ConfigError for a pack or row that the set does not have, ArtifactError for an unreadable
    tokenizer.
    """
    locations = locate_sequences(shard_set, pack=pack, row=row, sample=sample)
    printer = _Printer(shard_set, color=color, ids=ids)
    yield printer.legend()
    for pack_id, sequence in locations:
        yield from printer.pack(pack_id, only=sequence)


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
        kinds = " ".join(
            self._paint(name, name, trained=False) for _, name in sorted(self._names.items())
        )
        return (
            f"+ trained   ~ also covers bytes outside the text that its kind names   kinds: {kinds}"
        )

    def pack(self, pack_id: int, *, only: int | None = None) -> Iterator[str]:
        sequences = list(sequences_of(self._set, pack_id))
        yield (
            f"== pack {pack_id} of {self._set.num_packs}: {len(sequences)} sequences,"
            f" {sum(len(sequence.tokens) for sequence in sequences)} of"
            f" {self._set.manifest.max_seq_len} tokens,"
            f" {sum(sequence.num_loss_tokens for sequence in sequences)} trained"
        )
        for sequence in sequences:
            if only is None or sequence.index == only:
                position = f" from token {sequence.start} of its sample" if sequence.start else ""
                yield (
                    f"-- sequence {sequence.index}: {sequence.source} row {sequence.row}{position},"
                    f" {len(sequence.tokens)} tokens, {sequence.num_loss_tokens} trained"
                )
                yield from self._runs(sequence)

    def _runs(self, sequence: ShownSequence) -> Iterator[str]:
        """Yield the text line by line, for each run of tokens of one kind and mask."""
        tokens, kinds, mask = sequence.tokens, sequence.kinds, sequence.loss_mask
        changes = (np.diff(kinds) != 0) | (np.diff(mask) != 0)
        for start, stop in pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), len(tokens)]):
            kind, trained = int(kinds[start]), bool(mask[start])
            name = self._names.get(kind & KIND_MASK, f"kind {kind & KIND_MASK}")
            run = tokens[start:stop].tolist()
            marks = ("+" if trained else " ") + ("~" if kind & STRADDLES else " ")
            label = name
            # A newline stays visible as an escape at the end of its line.
            for line in _LINE.findall(b"".join(map(self._text.bytes_of, run))) or [b""]:
                text = self._paint(printable(line), name, trained=trained)
                yield f"{marks} {label:<{self._width}} | {text}"
                label = ""
            for first in range(0, len(run) if self._ids else 0, _IDS_PER_LINE):
                ids = (
                    f"{token} '{self._text.text_of([token])}'"
                    for token in run[first : first + _IDS_PER_LINE]
                )
                yield f"   {'ids':>{self._width}} : {'  '.join(ids)}"

    def _paint(self, text: str, kind: str, *, trained: bool) -> str:
        if not self._color:
            return text
        from rich.color import ColorSystem
        from rich.style import Style

        style = Style(color=_COLORS.get(kind, "white"), bold=trained, underline=trained)
        return style.render(text, color_system=ColorSystem.STANDARD)
