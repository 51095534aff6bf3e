"""A traced string that also records what a template asks of it, so that the same questions can be
asked of other text.

`'</think>' in content`, `content.startswith(...)`, `content.strip()` and truth are questions that a
guard can repeat on any text. Anything else that looks at the characters makes the rendering depend
on the text in a way that cannot be repeated: `Record.followed` turns false, and the template is
rendered by Jinja for each row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsIndex

from prep.rendering.traced_str import Mark, Traced


class Guard(NamedTuple):
    """A question asked of a message's content, and the answer that the rendering was made with."""

    message: int
    question: str  # a key of QUESTIONS
    argument: Any
    answer: bool


@dataclass
class Record:
    """What one rendering asked of its contents."""

    guards: set[Guard] = field(default_factory=set)
    followed: bool = True


QUESTIONS: dict[str, Callable[[str, Any], bool]] = {
    "contains": lambda text, part: part in text,
    "startswith": lambda text, prefix: text.startswith(prefix),
    "endswith": lambda text, suffix: text.endswith(suffix),
    "strip": lambda text, chars: text.strip(chars) == text,
    "lstrip": lambda text, chars: text.lstrip(chars) == text,
    "rstrip": lambda text, chars: text.rstrip(chars) == text,
    "equals": lambda text, other: text == other,
    "filled": lambda text, _: bool(text),
}


class RecordedStr(Traced):
    """The content of message `message`; -1 for a string made from several."""

    record: Record
    message: int

    @classmethod
    def of(
        cls, text: str, marks: tuple[Mark, ...], record: Record, message: int = -1
    ) -> "RecordedStr":
        """Return `text` as a string that reports to `record`."""
        self = cls(text, marks)
        self.record = record
        self.message = message
        return self

    def _ask(self, question: str, argument: Any = None) -> bool:
        answer = QUESTIONS[question](str.__getitem__(self, slice(None)), argument)
        parts = argument if type(argument) is tuple else (argument,)
        # an argument that is recorded itself changes with the conversation: no guard can hold it
        if self.message < 0 or any(part is not None and type(part) is not str for part in parts):
            self.record.followed = False
        else:
            self.record.guards.add(Guard(self.message, question, argument, answer))
        return answer

    def __add__(self, other: str) -> str:
        return self._derived(plain(self) + plain(other))

    def __radd__(self, other: str) -> str:
        return self._derived(plain(other) + plain(self))

    def __len__(self) -> int:
        # Python takes the length for the truth of a string; the `length` filter does not come here
        self._ask("filled")
        return str.__len__(self)

    def __contains__(self, part: Any) -> bool:
        return (
            self._ask("contains", part) if isinstance(part, str) else str.__contains__(self, part)
        )

    def __eq__(self, other: object) -> bool:
        return self._ask("equals", other) if isinstance(other, str) else False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        self.record.followed = False
        return str.__hash__(self)

    def startswith(self, prefix: str | tuple[str, ...], *bounds: SupportsIndex | None) -> bool:
        return (
            self._ask("startswith", prefix)
            if not bounds
            else self._lose(str.startswith(self, prefix, *bounds))
        )

    def endswith(self, suffix: str | tuple[str, ...], *bounds: SupportsIndex | None) -> bool:
        return (
            self._ask("endswith", suffix)
            if not bounds
            else self._lose(str.endswith(self, suffix, *bounds))
        )

    def strip(self, chars: str | None = None) -> str:
        return self if self._ask("strip", chars) else self._lose(str.strip(self, chars))

    def lstrip(self, chars: str | None = None) -> str:
        return self if self._ask("lstrip", chars) else self._lose(str.lstrip(self, chars))

    def rstrip(self, chars: str | None = None) -> str:
        return self if self._ask("rstrip", chars) else self._lose(str.rstrip(self, chars))

    def __iter__(self) -> Iterator[str]:
        self.record.followed = False
        yield from str.__iter__(self)

    def in_block(self) -> Traced:
        whole = Traced(plain(self), self.marks).in_block()
        return RecordedStr.of(whole, whole.marks, self.record)

    def _lose(self, value: Any) -> Any:
        self.record.followed = False
        return value

    def _derived(self, text: str) -> str:
        return RecordedStr.of(text, text.marks, self.record) if isinstance(text, Traced) else text


def plain(text: str) -> str:
    """Return the same text and marks, not recorded."""
    return (
        Traced(str.__getitem__(text, slice(None)), text.marks)
        if isinstance(text, RecordedStr)
        else text
    )


# Every method of str that is not overridden above ends the recording, also those of later Python
# releases, except for the few that tell nothing about the characters.
def _unfollowed(name: str) -> Callable[..., Any]:
    original = getattr(str, name)

    def method(self: RecordedStr, *args: Any, **kwargs: Any) -> Any:
        self.record.followed = False
        return original(self, *args, **kwargs)

    return method


_HARMLESS = {
    "__class__", "__new__", "__init__", "__init_subclass__", "__subclasshook__",
    "__getattribute__", "__setattr__", "__delattr__", "__doc__", "__dir__", "__str__",
    "__reduce__", "__reduce_ex__", "__getnewargs__", "__getstate__", "__sizeof__",
}  # fmt: skip
for _name in dir(str):
    if _name not in vars(RecordedStr) and _name not in _HARMLESS:
        setattr(RecordedStr, _name, _unfollowed(_name))
