"""Strings that remember where their characters came from, so that a chat template's own output says
who wrote what.

A `Traced` is a `str` with marks. Everything that a conversation brings into a template is traced;
what templates do to text (`+`, `~`, slices, strip, split, replace, trim, tojson ...) carries the
marks along, and the characters are the same as without tracing. Text of unknown origin has no mark:
the row then counts as unrendered, it is never guessed.

    template   '<|user|>\\n' + message.content.strip() + '\\n'        content = ' Hi '
    rendered    <|user|>\\nHi\\n
    marks                 [9, 11) = content[1:3] of message 0
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, SupportsIndex

_LONGEST_STEP = 64  # of a path: all that is within an object repeats its key
GENERATION = (
    -2
)  # the message index of a mark made by a {% generation %} block; no row can bring one


class Mark(NamedTuple):
    """Characters [start, end) of a string came from `field` of message `message`."""

    start: int
    end: int
    message: int  # index in the conversation; -1 for what belongs to no message (tools)
    field: str  # path of the field: "content", "tool_calls/0/function/arguments", ...
    source_start: (
        int  # where in the field's text; -1 where the text was transformed on the way (JSON)
    )


class Traced(str):
    """A str with marks, ordered as they were made."""

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
        if not old:
            return str.replace(self, old, new, count)
        return join(new, self.split(old, count))

    def join(self, parts: Iterable[str], /) -> str:
        return join(self, parts)

    def in_block(self) -> "Traced":
        """Return the same text, marked as what one {% generation %} block printed."""
        return Traced(self, (Mark(0, str.__len__(self), GENERATION, "", 0), *self.marks))

    def _cut(self, start: int, end: int) -> str:
        kept = []
        for mark in self.marks:
            first, last = max(mark.start, start), min(mark.end, end)
            # an empty piece of a message is still that message's: an all-blank answer has a place
            # too
            if first < last or (first == last and (mark.start == mark.end or start == end)):
                skipped = 0 if mark.source_start < 0 else first - mark.start
                kept.append(
                    mark._replace(
                        start=first - start,
                        end=last - start,
                        source_start=mark.source_start + skipped,
                    )
                )
        return Traced(str.__getitem__(self, slice(start, end)), tuple(kept))

    def _cut_three(self, first: int, second: int) -> tuple[str, str, str]:
        return self._cut(0, first), self._cut(first, second), self._cut(second, len(self))

    def _located(self, pieces: list[str], gap: int) -> list[str]:
        found, position = [], 0
        for piece in (
            pieces
        ):  # in order and verbatim, so the next occurrence after the separator is the piece
            position = self.index(piece, position)
            found.append(self._cut(position, position + len(piece)))
            position += len(piece) + gap
        return found


class TracedDict(dict[str, Any]):
    """A dict from a conversation (a tool, a tool call, its arguments), keys too; its JSON is marked
    as a whole."""

    def __init__(self, value: dict[str, Any], message: int, field: str) -> None:
        paths = ((f"{field}/{key[:_LONGEST_STEP]}", key, item) for key, item in value.items())
        super().__init__(
            {traced(key, message, path): traced(item, message, path) for path, key, item in paths}
        )
        self._traced_origin = (
            message,
            field,
        )  # a public name would hide a key of that name from the template

    def __str__(self) -> str:
        return json_marked(repr(self), self)


class TracedList(list[Any]):
    """A list from a conversation, likewise."""

    def __init__(self, value: list[Any], message: int, field: str) -> None:
        super().__init__(
            traced(item, message, f"{field}/{index}") for index, item in enumerate(value)
        )
        self._traced_origin = (
            message,
            field,
        )  # a public name would hide a key of that name from the template

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
    """Join strings, marks included: what Jinja's `"".join` is replaced by."""
    parts = list(parts)
    marks: list[Mark] = []
    position = 0
    own = _marks(separator)
    for index, part in enumerate(parts):
        if index:
            marks += _shifted(own, position)
            position += len(separator)
        marks += _shifted(_marks(part), position)
        position += len(part)
    text = str.join(separator, parts)
    return Traced(text, tuple(marks)) if marks else text


def json_marked(text: str, value: Any) -> str:
    """Return `text`, the JSON (or repr) of `value`, marked with the origins found in `value`."""
    origins = dict.fromkeys(_origins(value))
    return (
        Traced(text, tuple(Mark(0, len(text), *origin, -1) for origin in origins))
        if origins
        else text
    )


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
