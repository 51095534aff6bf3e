"""Does a rendering hold all that its conversation says? A template that drops a message or a field
says nothing of it.

Whitespace that a template strips is not a loss. Nor is the reasoning of an earlier turn, where the
template is one that prints the reasoning of the last turn: models of that family are meant to
forget it. What the last message reasons must be there.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from prep.conversations.conversation import Conversation
from prep.rendering.template import reasoning_of
from prep.rendering.traced_str import Mark, Traced
from prep.rendering.turns import SpanRules

_TEXT = ("content", "reasoning_content", "function_calls", "functions")


def unrendered_fields(
    text: Traced, conversation: Conversation, rules: SpanRules
) -> tuple[int, str] | None:
    """Return (message index, reason) of the first message or field that the rendering lacks, or
    None.

    A reason is "ROLE message" for a message that is absent altogether, "ROLE.FIELD" for a field.
    """
    return next(all_unrendered(text, conversation, rules), None)


def all_unrendered(
    text: Traced, conversation: Conversation, rules: SpanRules
) -> Iterator[tuple[int, str]]:
    """Yield the same for every message that the rendering lacks or that lacks a field."""
    own: dict[int, list[Mark]] = {}
    for mark in text.marks:
        own.setdefault(mark.message, []).append(mark)
    for index, message in enumerate(conversation.messages):
        marks = own.get(index, [])
        role = message["role"]
        if not marks:
            if role == "system" and not message["content"].strip():
                continue  # an empty system message says nothing
            yield index, f"{role} message"
            continue
        for field in _missing_fields(
            message, marks, rules, is_last=index == len(conversation.messages) - 1
        ):
            yield index, f"{role}.{field}"
            break


def without_messages(conversation: Conversation, indices: Collection[int]) -> Conversation:
    """Return the conversation without some messages."""
    keep = [i for i in range(len(conversation.messages)) if i not in indices]
    return Conversation(
        messages=tuple(conversation.messages[i] for i in keep),
        tools=conversation.tools,
        train=tuple(conversation.train[i] for i in keep),
    )


def _missing_fields(
    message: Mapping[str, Any], marks: list[Mark], rules: SpanRules, *, is_last: bool
) -> Iterator[str]:
    for field in _TEXT:
        value = reasoning_of(message) if field == "reasoning_content" else message.get(field)
        if not isinstance(value, str) or not value.strip():
            continue
        pieces = sorted(mark for mark in marks if mark.field == field)
        if message["role"] == "assistant":
            if field == "reasoning_content" and rules.carries_reasoning and not is_last:
                continue
            knows_thinking = rules.carries_reasoning or rules.carries_thinking
            if field == "content" and knows_thinking and value.count("</think>") == 1:
                value = _answer_of(value, is_last=is_last)
        if not _text_is_there(value, pieces):
            yield field
    for call, value in enumerate(message.get("tool_calls") or ()):
        function = value.get("function", value)
        path = f"tool_calls/{call}/function" if "function" in value else f"tool_calls/{call}"
        for name in ("name", "arguments"):
            if function.get(name) and not _path_is_there(f"{path}/{name}", marks):
                yield "tool_calls"
                return


def _answer_of(value: str, *, is_last: bool) -> str:
    """Return `value` with blanks for what a template that knows reasoning may print in its own way,
    or forget."""
    end = value.index("</think>")
    if not is_last:
        return " " * (end + len("</think>")) + value[end + len("</think>") :]
    return value.replace("<think>", " " * len("<think>"), 1).replace(
        "</think>", " " * len("</think>")
    )


def _text_is_there(value: str, pieces: list[Mark]) -> bool:
    if any(mark.source_start < 0 for mark in pieces):
        return True  # printed whole, as JSON
    position = 0
    for start, end in sorted(
        (mark.source_start, mark.source_start + mark.end - mark.start) for mark in pieces
    ):
        if start > position and value[position:start].strip():
            return False
        position = max(position, end)
    return not value[position:].strip()


def _path_is_there(path: str, marks: list[Mark]) -> bool:
    return any(
        mark.field == path or path.startswith(mark.field + "/") or mark.field.startswith(path + "/")
        for mark in marks
    )
