"""Which tokens only the template may make: special ones, EOS, and every added token that opens or
ends messages.

Some tokenizers flag a role marker `special: false` (DeepSeek's <｜Assistant｜>): typed by a user it
would become one all the same. So the template says what its markers are: the added tokens that it
prints around inert contents. What it prints within an answer, such as <think>, is none: models
write these themselves, and they match as in Hugging Face.

    <｜User｜>  question  <｜Assistant｜>  answer  <｜end｜>     of an opening what every turn has
    marker               marker                  terminator
"""

import re
from collections.abc import Mapping
from typing import Any

from prep.conversations.conversation import Conversation
from prep.rendering.template import ChatTemplate
from prep.rendering.turns import any_of
from shared.errors import TemplateError

_TALK = ("user", "assistant", "user", "assistant")
_SHAPES = (_TALK, ("system", *_TALK), ("user", "assistant", "tool", "tool", "assistant"))
_REASON, _ANSWER = "STAND-IN-REASON", "STAND-IN-ANSWER"
_THINKING = frozenset(
    ("<think>", "</think>")
)  # reasoning by their name, whatever a template does with them


def control_tokens(
    template: ChatTemplate, always: tuple[str, ...], added: Mapping[str, bool]
) -> tuple[str, ...]:
    """Return `always`, and the tokens among `added` (content -> special) that are markers of the
    template, sorted."""
    others = {token for token in added if is_markup(token)} - set(always) - _THINKING
    if not others:
        return tuple(sorted(always))
    pattern = any_of((*always, *others))
    printed: set[str] = set()
    for roles in _SHAPES:
        printed |= _markers(template, roles, pattern)
    return tuple(sorted({*always, *(printed & (others - _reasoning_tags(template, pattern)))}))


def is_markup(token: str) -> bool:
    """Say whether a token is more than blanks, letters and digits: words and runs of blanks mark
    nothing."""
    return not token.replace(" ", "").isalnum() and bool(token.strip())


def _markers(template: ChatTemplate, roles: tuple[str, ...], pattern: re.Pattern[str]) -> set[str]:
    contents = [f"STAND-IN-{index}." for index in range(len(roles))]
    text = _rendered(
        template, *({"role": r, "content": c} for r, c in zip(roles, contents, strict=True))
    )
    prompt = template.generation_prompt()
    places = [text.find(content) for content in contents]
    if -1 in places or places != sorted(places):
        return set()
    markers: set[str] = set()
    openings: list[set[str]] = []  # of each assistant turn
    ends = [0, *(place + len(content) for place, content in zip(places, contents, strict=True))]
    for role, start, end in zip((*roles, ""), ends, (*places, len(text)), strict=True):
        if role != "assistant":
            markers |= set(pattern.findall(text, start, end))
            continue
        prompted = text.rfind(prompt, start, end) if prompt else start
        opening = start if prompted < 0 else prompted
        markers |= set(pattern.findall(text, start, opening))
        openings.append(
            set(
                pattern.findall(
                    text, opening, prompted + len(prompt) if prompt and prompted >= 0 else end
                )
            )
        )
    return markers | set.intersection(*openings)


def _reasoning_tags(template: ChatTemplate, pattern: re.Pattern[str]) -> set[str]:
    """Return what the template prints right around reasoning, unless it opens a turn without any
    just the same."""
    asked = {"role": "user", "content": "x"}
    plain = _rendered(template, asked, {"role": "assistant", "content": _ANSWER})
    text = _rendered(
        template, asked, {"role": "assistant", "content": _ANSWER, "reasoning_content": _REASON}
    )
    start, end = text.find(_REASON), text.find(_ANSWER)
    behind = pattern.findall(text, start, end) if 0 <= start < end else []
    if not behind:
        return set()
    marker = pattern.findall(plain, 0, max(plain.find(_ANSWER), 0))[-1:]
    return {behind[0], *pattern.findall(text, 0, start)[-1:]} - set(marker)


def _rendered(template: ChatTemplate, *messages: dict[str, Any]) -> str:
    try:
        return template.render_plain(
            Conversation(messages=messages, tools=None, train=(None,) * len(messages))
        )
    except TemplateError:
        return ""
