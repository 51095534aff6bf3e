"""Does a rendering contain all of its conversation? A template drops a message or a field silently.

Whitespace that a template strips is no loss. Nor is the reasoning of an earlier turn, where the
template prints the reasoning of the last turn: models of that family are meant to forget it. The
reasoning of the last message must be there.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from prep.conversations.conversation import Conversation
from prep.rendering.template import reasoning_of
from prep.rendering.traced_str import Mark, Traced
from prep.rendering.turns import SpanRules

_TEXT_FIELDS = ("content", "reasoning_content", "function_calls", "functions")
_OPEN_THINKING, _CLOSE_THINKING = "<think>", "</think>"


def unrendered_fields(
    text: Traced, conversation: Conversation, rules: SpanRules
) -> tuple[int, str] | None:
    """Return (message index, reason) of the first message or field that the rendering lacks, or
    None.

    The reason is "ROLE message" for a whole message, "ROLE.FIELD" for a field.
    """
    return next(all_unrendered(text, conversation, rules), None)


def all_unrendered(
    text: Traced, conversation: Conversation, rules: SpanRules
) -> Iterator[tuple[int, str]]:
    """Yield the same for every message that is missing or lacks a field."""
    marks_of: dict[int, list[Mark]] = {}
    for mark in text.marks:
        marks_of.setdefault(mark.message, []).append(mark)
    last = len(conversation.messages) - 1
    for index, message in enumerate(conversation.messages):
        role, marks = message["role"], marks_of.get(index)
        if marks:
            field = next(_missing_fields(message, marks, rules, is_last=index == last), None)
            if field:
                yield index, f"{role}.{field}"
        # an empty system message has nothing to print
        elif role != "system" or message["content"].strip():
            yield index, f"{role} message"


def without_messages(conversation: Conversation, indices: Collection[int]) -> Conversation:
    """Return the conversation without the messages at `indices`."""
    keep = [i for i in range(len(conversation.messages)) if i not in indices]
    return Conversation(
        messages=tuple(conversation.messages[i] for i in keep),
        tools=conversation.tools,
        train=tuple(conversation.train[i] for i in keep),
    )


def _missing_fields(
    message: Mapping[str, Any], marks: list[Mark], rules: SpanRules, *, is_last: bool
) -> Iterator[str]:
    is_assistant = message["role"] == "assistant"
    for field in _TEXT_FIELDS:
        value = reasoning_of(message) if field == "reasoning_content" else message.get(field)
        if not isinstance(value, str) or not value.strip():
            continue
        if is_assistant and field == "reasoning_content" and rules.prints_reasoning and not is_last:
            continue
        # A template that knows reasoning may print <think> tags in its own way, and forget what an
        # earlier answer holds between them. Blanks take their place: blanks need not be printed,
        # and the offsets of the rest stay what the marks say.
        knows_thinking = is_assistant and (rules.prints_reasoning or rules.prints_thinking)
        if knows_thinking and field == "content" and value.count(_CLOSE_THINKING) == 1:
            end = value.index(_CLOSE_THINKING) + len(_CLOSE_THINKING)
            value = (
                value.replace(_OPEN_THINKING, " " * len(_OPEN_THINKING), 1).replace(
                    _CLOSE_THINKING, " " * len(_CLOSE_THINKING)
                )
                if is_last
                else " " * end + value[end:]
            )
        ranges = sorted((m.source_start, m.end - m.start) for m in marks if m.field == field)
        # a mark without an offset is that of a field which is printed whole, as JSON
        if ranges and ranges[0][0] < 0:
            continue
        uncovered, position = "", 0
        for start, length in ranges:
            uncovered += value[position:start]
            position = max(position, start + length)
        if (uncovered + value[position:]).strip():
            yield field
    for call, value in enumerate(message.get("tool_calls") or ()):
        function = value.get("function", value)
        path = f"tool_calls/{call}/function" if "function" in value else f"tool_calls/{call}"
        for name in ("name", "arguments"):
            # printed itself, within something larger (a whole call as JSON), or piece by piece
            inner = f"{path}/{name}"
            if function.get(name) and not any(
                mark.field == inner
                or inner.startswith(mark.field + "/")
                or mark.field.startswith(inner + "/")
                for mark in marks
            ):
                yield "tool_calls"
                return
