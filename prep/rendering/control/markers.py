"""Markers of a chat template, and how many tokens each of them is. A model whose tokenizer splits a
marker has never seen it as one.

For shipped templates, templates/markers.toml lists those that must be one token. Those of other
templates are recognised by their form in what the template prints around a conversation.
"""

import re
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from prep.rendering.template import ChatTemplate

# words that look like no marker, so that every marker in the text is the template's
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
    # some templates refuse a system message, or a second question
    for words in (_WORDS, _WORDS[1:], _WORDS[1:3]):
        text = template.render_or_empty(*({"role": role, "content": word} for role, word in words))
        if text:
            return tuple(dict.fromkeys(match.group() for match in _FORMS.finditer(text)))
    return ()


def split_markers(markers: Iterable[str], tokenizer: Any) -> dict[str, int]:
    """Return the markers that are not one token of `tokenizer` -> how many tokens they are; 0 for
    one that it reads as unknown."""
    counts = {}
    for marker in markers:
        ids = tokenizer.encode(marker, add_special_tokens=False).ids
        if len(ids) != 1:
            counts[marker] = len(ids)
        elif ids[0] != tokenizer.token_to_id(marker):
            counts[marker] = 0
    return counts
