"""A control token typed in a conversation, printed by a template in a way that loses its origin, is caught here.

What is text of a message is known from its marks. Behind an operation that drops marks (`"%s" % name`, `|indent`) a
typed `<|im_end|>` would look like the template's own. So a conversation that types one where the template may lose
track of it is rendered again with the token made harmless: the template's own control tokens must stay where they were.
"""

import re
from collections.abc import Iterator
from typing import Any

from prep.conversation import Conversation
from prep.spans import Rendered
from prep.template import ChatTemplate
from shared.errors import TemplateError

_PLAIN_KEYS = frozenset(("role", "content", "functions", "function_calls"))  # a part that loses its mark is uncarried


def check_typed_control(
    template: ChatTemplate, conversation: Conversation, rendered: Rendered, control: re.Pattern[str]
) -> None:
    """Raise TemplateError where a control token outside the texts of a rendering was typed in the conversation."""
    if not _types_control(conversation, control):
        return
    harmless = Conversation(
        messages=tuple(_harmless(message, control) for message in conversation.messages),
        tools=_harmless(conversation.tools, control),
        train=conversation.train,
    )
    texts = [(span.start, span.end) for span in rendered.spans if span.is_text]
    outside = {found.span() for found in control.finditer(_blanked(rendered.text, texts))}
    expected = {found.span() for found in control.finditer(_blanked(template.render_plain(harmless), texts))}
    if outside != expected:
        raise TemplateError("the template prints a control token that was typed in the conversation as its own")


def _types_control(conversation: Conversation, control: re.Pattern[str]) -> bool:
    odd: list[Any] = [
        message for message in conversation.messages if len(message) > 2 and not message.keys() <= _PLAIN_KEYS
    ]
    if conversation.tools is not None:
        odd.append(conversation.tools)
    return any(control.search(text) for text in _strings(odd))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _harmless(value: Any, control: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return control.sub(lambda found: "x" * len(found[0]), value)
    if isinstance(value, dict):
        return {_harmless(key, control): _harmless(item, control) for key, item in value.items()}
    if isinstance(value, list):
        return [_harmless(item, control) for item in value]
    return value


def _blanked(text: str, ranges: list[tuple[int, int]]) -> str:
    """Return `text` with blanks in `ranges`, which are ordered and disjoint."""
    pieces, cursor = [], 0
    for start, end in ranges:
        pieces += [text[cursor:start], " " * (end - start)]
        cursor = end
    return "".join([*pieces, text[cursor:]])
