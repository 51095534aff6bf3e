"""The control tokens of a row are those of the same conversation with inert contents; anything else
leaves the row out.

What is text of a message is known from its marks, and the tokenizer makes no control token of it.
But a template may print text in a way that loses the marks (`|indent`, `'%s' % name`, `|lower`), a
second time beside the first: a typed `<|im_end|>` would then look like the template's own. So such
a conversation is rendered again with the letters of its markup made harmless, and must print the
same control tokens, one by one.

A conversation need not be rendered again where its strings lack a character without which no
control token is written, and the template's own words hold that character nowhere but in whole
control tokens.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from prep.conversations.conversation import Conversation
from prep.rendering.spans import Rendered
from prep.rendering.template import ChatTemplate
from prep.rendering.turns import SpanRules
from shared.errors import TemplateError

_TAG = re.compile(r"</?[^\s<>]+>")
_REASONING_TAG = re.compile(r"</?think>")  # templates look for it; it is no control token


class ControlCheck:
    """Compares control tokens of a rendering with those of inert contents, for one template and
    tokenizer."""

    def __init__(
        self, template: ChatTemplate, rules: SpanRules, control_tokens: tuple[str, ...]
    ) -> None:
        self._template = template
        self._control = rules.control
        tokens = [token for token in control_tokens if token.strip()]
        markup = {
            char for token in tokens for char in token if not char.isalnum() and not char.isspace()
        }
        # what is left of the template's words without control tokens, and without whole tags that
        # begin none
        words = self._control.sub("", "\n".join(template.own_strings()))
        words = _TAG.sub(
            lambda tag: tag[0] if any(tag[0] in token for token in tokens) else "", words
        )
        needed = _covering(tokens, markup - set(words))
        # None: the template may put a control token together around a string of the row, so every
        # row is rendered again
        self._needed = (
            None if needed is None else re.compile(f"[{re.escape(''.join(sorted(needed)))}]")
        )
        harmful = [re.escape(token) for token in tokens] + [
            re.escape(char) for char in sorted(markup)
        ]
        self._harmful = re.compile("|".join(harmful) or r"(?!)", re.IGNORECASE)

    def check(self, conversation: Conversation, rendered: Rendered) -> Rendered:
        """Return `rendered` with its control tokens. Raises TemplateError where inert contents
        would give others."""
        texts = [(span.start, span.end) for span in rendered.spans if span.is_text]
        printed = tuple(
            found[0] for found in self._control.finditer(_blanked(rendered.text, texts))
        )
        if self._may_type_control(conversation):
            inert = self._template.render_plain(self.inert(conversation))
            if printed != tuple(self._control.findall(inert)):
                raise TemplateError(
                    "the template prints a control token that was typed in the conversation as"
                    " its own"
                )
        return replace(rendered, control=printed)

    def inert(self, conversation: Conversation) -> Conversation:
        """Return the conversation with harmless contents: of the same lengths, blanks and reasoning
        tags kept."""
        every_letter = self._needed is None
        return Conversation(
            messages=tuple(
                {
                    key: v if key == "role" else self._inert(v, every_letter)
                    for key, v in message.items()
                }
                for message in conversation.messages
            ),
            tools=self._inert(conversation.tools, False),
            train=conversation.train,
        )

    def _may_type_control(self, conversation: Conversation) -> bool:
        if self._needed is None:
            return True
        texts = _strings(
            [{k: v for k, v in m.items() if k != "role"} for m in conversation.messages]
        )
        return any(map(self._needed.search, texts)) or any(
            map(self._needed.search, _strings(conversation.tools))
        )

    def _inert(self, value: Any, every_letter: bool) -> Any:
        if isinstance(value, str):
            return self._inert_text(value, every_letter)
        if isinstance(
            value, dict
        ):  # a template finds its fields by their keys: only markup in them is harmless
            return {
                self._inert_text(k, False): self._inert(v, every_letter) for k, v in value.items()
            }
        if isinstance(value, list):
            return [self._inert(item, every_letter) for item in value]
        return value

    def _inert_text(self, text: str, every_letter: bool) -> str:
        pieces, cursor = [], 0
        for tag in [*_REASONING_TAG.finditer(text), None]:
            words = text[cursor : tag.start() if tag else len(text)]
            words = (
                re.sub(r"\S", "x", words)
                if every_letter
                else self._harmful.sub(_crossed_out, words)
            )
            pieces += [words, tag[0] if tag else ""]
            cursor = tag.end() if tag else cursor
        return "".join(pieces)


def _covering(tokens: list[str], characters: set[str]) -> set[str] | None:
    """Return some of `characters` such that each token holds one, None where they do not do."""
    chosen: set[str] = set()
    left = list(tokens)
    while left:
        best = max(
            sorted(characters), key=lambda char: sum(char in token for token in left), default=""
        )
        if not best or not any(best in token for token in left):
            return None
        chosen.add(best)
        left = [token for token in left if best not in token]
    return chosen


def _crossed_out(found: re.Match[str]) -> str:
    return "x" * len(found[0])


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


def _blanked(text: str, ranges: list[tuple[int, int]]) -> str:
    """Return `text` with blanks in `ranges`, which are ordered and disjoint."""
    pieces, cursor = [], 0
    for start, end in ranges:
        pieces += [text[cursor:start], " " * (end - start)]
        cursor = end
    return "".join([*pieces, text[cursor:]])
