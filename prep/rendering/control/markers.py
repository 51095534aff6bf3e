"""Markers of a chat template, and how many tokens each is: a marker that a tokenizer splits was
never one to its model.

Shipped templates say which of theirs must be one token (templates/markers.toml). Those of other
templates are found in what they print around a conversation, by their form.
"""

import re
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from prep.conversations.conversation import Conversation
from prep.rendering.template import ChatTemplate
from shared.errors import TemplateError

_WORDS = (
    ("system", "alpha"),
    ("user", "beta"),
    ("assistant", "gamma"),
    ("user", "delta"),
    ("assistant", "epsilon"),
)
_FORMS = re.compile(
    # <|im_start|>, and with DeepSeek's full-width bars
    r"<(?P<bar>[|\uff5c])[^<>\n]{1,60}?(?P=bar)>"
    r"|</?[A-Za-z][\w.:-]{0,60}>"  # <start_of_turn>, </s>
    r"|\[/?[A-Z][A-Z_]{1,60}\]"  # [INST]
)


def required_markers(template: str) -> tuple[str, ...]:
    """Return the markers of a shipped template that must be one token each."""
    file = Path(str(resources.files("prep"))) / "templates" / "markers.toml"
    return tuple(tomllib.loads(file.read_text(encoding="utf-8"))[template])


def printed_markers(template: ChatTemplate) -> tuple[str, ...]:
    """Return what looks like a marker in the template's own words around a conversation, in
    order."""
    for words in (
        _WORDS,
        _WORDS[1:],
        _WORDS[1:3],
    ):  # some refuse a system message, or a second question
        messages = tuple({"role": role, "content": text} for role, text in words)
        try:
            text = template.render_plain(
                Conversation(messages=messages, tools=None, train=(None,) * len(messages))
            )
        except TemplateError:
            continue
        return tuple(dict.fromkeys(match.group() for match in _FORMS.finditer(text)))
    return ()


def split_markers(markers: Iterable[str], tokenizer: Any) -> dict[str, int]:
    """Return the markers that are no token of `tokenizer` -> how many they take, 0 for one that it
    reads as unknown."""
    found = {}
    for marker in markers:
        ids = tokenizer.encode(marker, add_special_tokens=False).ids
        if len(ids) != 1:
            found[marker] = len(ids)
        elif ids[0] != tokenizer.token_to_id(marker):
            found[marker] = 0
    return found
