"""Strings that remember where their characters came from, so that a template's own output shows
who wrote what.

A `Traced` is a `str` with marks. Everything that a conversation hands to a template is traced.
What templates do to text (`+`, `~`, slices, strip, split, replace, trim, tojson ...) keeps the
marks, and the characters are the same as without tracing. Text of unknown origin has no mark: its
row then counts as unrendered. An origin is never guessed.

    template   '<|user|>\\n' + message.content.strip() + '\\n'        content = ' Hi '
    rendered    <|user|>\\nHi\\n
    marks                 [9, 11) = content[1:3] of message 0
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, SupportsIndex

# Characters of a key in a path. Every value within an object repeats the key, so that a key of a
# megabyte above a thousand values would take a gigabyte.
_LONGEST_STEP = 64
# the message index of marks that {% generation %} blocks make; no row can contain it
GENERATION = -2


class Mark(NamedTuple):
    """Characters [start, end) of a string came from `field` of message `message`."""

    start: int
    end: int
    message: int  # index in the conversation; -1 for what belongs to no message (tools)
    field: str  # path of the field: "content", "tool_calls/0/function/arguments", ...
    # offset in the field's text; -1 for text that was transformed on the way (JSON)
    source_start: int


class Traced(str):
    """A str with marks, in the order in which they were made."""

    marks: tuple[Mark, ...]

    def __new__(cls, text: str, marks: tuple[Mark, ...] = ()) -> "Traced":
        self = super().__new__(cls, text)
        self.marks = marks
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(self, other), self.marks + _shifted(_marks(other), len(self)))

    def __radd__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(other, self), _marks(other) + _shifted(self.marks, len(other)))

    # Slices and single characters keep their marks; a stepped slice (a reversal) loses them all.
    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if not isinstance(key, slice):
            index = range(len(self))[key]
            return self._cut(index, index + 1)
        start, stop, step = key.indices(len(self))
        return self._cut(start, max(start, stop)) if step == 1 else str.__getitem__(self, key)

    def __iter__(self) -> Iterator[str]:
        return (self._cut(index, index + 1) for index in range(len(self)))

    def strip(self, chars: str | None = None) -> str:
        start = len(self) - len(str.lstrip(self, chars))
        return self._cut(start, max(start, len(str.rstrip(self, chars))))

    def lstrip(self, chars: str | None = None) -> str:
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> str:
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self._cut(len(prefix), len(self)) if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> str:
        return self._cut(0, len(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._located(str.splitlines(self, keepends), 0)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, _ = str.partition(self, sep)
        return self._cut_three(len(head), len(head) + len(middle))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, _ = str.rpartition(self, sep)
        return self._cut_three(len(head), len(head) + len(middle))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        # an empty `old` puts `new` between all characters, which no template needs traced
        if not old:
            return str.replace(self, old, new, count)
        return join(new, self.split(old, count))

    def join(self, parts: Iterable[str], /) -> str:
        return join(self, parts)

    def in_block(self) -> "Traced":
        """Return the same text, marked as what one {% generation %} block printed."""
        return Traced(self, (Mark(0, str.__len__(self), GENERATION, "", 0), *self.marks))

    def _cut(self, start: int, end: int) -> str:
        marks = []
        for mark in self.marks:
            first, last = max(mark.start, start), min(mark.end, end)
            # An empty piece of a message still belongs to it: an answer of blanks alone, stripped,
            # is a turn with a position and a terminator.
            if first < last or (first == last and (mark.start == mark.end or start == end)):
                skipped = 0 if mark.source_start < 0 else first - mark.start
                marks.append(
                    mark._replace(
                        start=first - start,
                        end=last - start,
                        source_start=mark.source_start + skipped,
                    )
                )
        return Traced(str.__getitem__(self, slice(start, end)), tuple(marks))

    def _cut_three(self, first: int, second: int) -> tuple[str, str, str]:
        return self._cut(0, first), self._cut(first, second), self._cut(second, len(self))

    def _located(self, pieces: list[str], gap: int) -> list[str]:
        # The pieces are verbatim and in order: the next occurrence after the separator is the one.
        traced_pieces, position = [], 0
        for piece in pieces:
            position = self.index(piece, position)
            traced_pieces.append(self._cut(position, position + len(piece)))
            position += len(piece) + gap
        return traced_pieces


class TracedDict(dict[str, Any]):
    """A dict from a conversation (a tool, a tool call, its arguments), with traced keys; its JSON
    is marked as a whole."""

    def __init__(self, value: dict[str, Any], message: int, field: str) -> None:
        paths = ((f"{field}/{key[:_LONGEST_STEP]}", key, item) for key, item in value.items())
        super().__init__(
            {traced(key, message, path): traced(item, message, path) for path, key, item in paths}
        )
        # private: a public attribute would hide a key of the same name from the template
        self._traced_origin = (message, field)

    def __str__(self) -> str:
        return json_marked(repr(self), self)


class TracedList(list[Any]):
    """A list from a conversation, likewise."""

    def __init__(self, value: list[Any], message: int, field: str) -> None:
        super().__init__(
            traced(item, message, f"{field}/{index}") for index, item in enumerate(value)
        )
        self._traced_origin = (message, field)

    def __str__(self) -> str:
        return json_marked(repr(self), self)


def traced(value: Any, message: int, field: str) -> Any:
    """Return `value` (text, or JSON-like data) with its origin attached."""
    if isinstance(value, str):
        return Traced(value, (Mark(0, len(value), message, field, 0),))
    if isinstance(value, dict):
        return TracedDict(value, message, field)
    if isinstance(value, list):
        return TracedList(value, message, field)
    return value


def join(separator: str, parts: Iterable[str]) -> str:
    """Join strings and their marks; takes the place of Jinja's `"".join`."""
    parts = list(parts)
    marks: list[Mark] = []
    position = 0
    separator_marks = _marks(separator)
    for index, part in enumerate(parts):
        if index:
            marks += _shifted(separator_marks, position)
            position += len(separator)
        marks += _shifted(_marks(part), position)
        position += len(part)
    text = str.join(separator, parts)
    return Traced(text, tuple(marks)) if marks else text


def json_marked(text: str, value: Any) -> str:
    """Return `text`, the JSON (or repr) of `value`, marked with every origin within `value`."""
    origins = dict.fromkeys(_origins(value))
    return (
        Traced(text, tuple(Mark(0, len(text), *origin, -1) for origin in origins))
        if origins
        else text
    )


# JSON moves and escapes characters, so its marks know the message and the field, and no offset.
def _origins(value: Any) -> Iterator[tuple[int, str]]:
    if isinstance(value, TracedDict | TracedList):
        yield value._traced_origin
    elif isinstance(value, Traced):
        yield from (
            (mark.message, mark.field) for mark in value.marks if mark.message != GENERATION
        )
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _origins(key)
            yield from _origins(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _origins(item)


def _marks(text: str) -> tuple[Mark, ...]:
    return text.marks if isinstance(text, Traced) else ()


def _shifted(marks: tuple[Mark, ...], by: int) -> tuple[Mark, ...]:
    if not by:
        return marks
    return tuple(Mark(m.start + by, m.end + by, m.message, m.field, m.source_start) for m in marks)
