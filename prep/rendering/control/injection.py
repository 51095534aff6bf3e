"""Nobody can inject a control token: the control tokens of a row are those of the same conversation
with inert contents, or the row is left out.

Marks tell which text is a message's, and the tokenizer makes no control token of that. But a
template may print a text once more in a way that loses the marks (`|indent`, `'%s' % name`,
`|lower`): a typed `<|im_end|>` would then look like the template's own. So the conversation is
rendered again with its markup crossed out, and must print the same control tokens, one by one.

The second rendering is skipped if it cannot matter: every control token contains one of a few
characters, the strings of the conversation contain none of them, and neither do the template's own
words outside whole control tokens.
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
    """Compares the control tokens of a rendering with those of inert contents, for one template
    and tokenizer."""

    def __init__(
        self, template: ChatTemplate, rules: SpanRules, control_tokens: tuple[str, ...]
    ) -> None:
        self._template = template
        self._control = rules.control
        tokens = [token for token in control_tokens if token.strip()]
        markup = {
            char for token in tokens for char in token if not char.isalnum() and not char.isspace()
        }
        # The template's own words without control tokens, and without whole tags (<tool_call>) that
        # are part of none: what is left could complete a typed half of a control token.
        words = self._control.sub("", "\n".join(template.literals()))
        words = _TAG.sub(
            lambda tag: tag[0] if any(tag[0] in token for token in tokens) else "", words
        )
        needed = _covering(tokens, markup - set(words))
        # None: the template may build a control token around a string of the row, so every row is
        # rendered again
        self._needed = (
            None if needed is None else re.compile(f"[{re.escape(''.join(sorted(needed)))}]")
        )
        harmful = [re.escape(token) for token in tokens] + [
            re.escape(char) for char in sorted(markup)
        ]
        self._harmful = re.compile("|".join(harmful) or r"(?!)", re.IGNORECASE)

    def check(self, conversation: Conversation, rendered: Rendered) -> Rendered:
        """Return `rendered` with its control tokens. Raises TemplateError if inert contents would
        give others."""
        # The texts of the conversation become blanks, which keeps a token from forming across one.
        pieces, cursor = [], 0
        for span in rendered.spans:
            if span.is_text:
                pieces += [rendered.text[cursor : span.start], " " * (span.end - span.start)]
                cursor = span.end
        printed = tuple(self._control.findall("".join([*pieces, rendered.text[cursor:]])))
        texts = [{k: v for k, v in m.items() if k != "role"} for m in conversation.messages]
        if self._needed is None or any(
            map(self._needed.search, _strings([texts, conversation.tools]))
        ):
            inert = self._template.render_plain(self.inert(conversation))
            if printed != tuple(self._control.findall(inert)):
                raise TemplateError(
                    "the template prints a control token that was typed in the conversation as"
                    " its own"
                )
        return replace(rendered, control=printed)

    def inert(self, conversation: Conversation) -> Conversation:
        """Return the conversation with harmless contents of the same lengths; blanks and reasoning
        tags stay."""
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

    def _inert(self, value: Any, every_letter: bool) -> Any:
        if isinstance(value, str):
            return self._inert_text(value, every_letter)
        if isinstance(value, dict):
            # a template finds its fields by their keys, so these lose only their markup
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
                else self._harmful.sub(lambda match: "x" * len(match[0]), words)
            )
            pieces += [words, tag[0] if tag else ""]
            cursor = tag.end() if tag else cursor
        return "".join(pieces)


def _covering(tokens: list[str], characters: set[str]) -> set[str] | None:
    """Return a few of `characters` such that each token contains one, None if there are none."""
    chosen: set[str] = set()
    left = list(tokens)
    while left:
        # greedy: the character that most of the tokens contain
        best = max(
            sorted(characters), key=lambda char: sum(char in token for token in left), default=""
        )
        if not best or not any(best in token for token in left):
            return None
        chosen.add(best)
        left = [token for token in left if best not in token]
    return chosen


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
