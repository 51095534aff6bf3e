"""Which tokens only the template may produce: special ones, EOS, and every added token that opens
or ends messages.

Some tokenizers flag a role marker `special: false` (DeepSeek's <｜Assistant｜>), and still make the
token of it when a user types it. So the template decides what its markers are: the added tokens
that it prints around inert contents. What it prints within an answer, such as <think>, is no
marker: models write these tokens themselves, and text may contain them as with Hugging Face.

    <｜User｜>  question  <｜Assistant｜>  answer  <｜end｜>
    marker               marker                  terminator

Of what opens an answer, only the tokens that every answer has are markers.
"""

import re
from collections.abc import Mapping

from prep.rendering.template import ChatTemplate
from prep.rendering.turns import any_of

_TALK = ("user", "assistant", "user", "assistant")
_SHAPES = (_TALK, ("system", *_TALK), ("user", "assistant", "tool", "tool", "assistant"))
_REASON, _ANSWER = "STAND-IN-REASON", "STAND-IN-ANSWER"
# always reasoning, whatever a template does with them
_THINKING = frozenset(("<think>", "</think>"))


def control_tokens(
    template: ChatTemplate, always: tuple[str, ...], added: Mapping[str, bool]
) -> tuple[str, ...]:
    """Return `always`, and the tokens among `added` (content -> special) that are markers of the
    template, sorted."""
    others = {token for token in added if is_markup(token)} - set(always) - _THINKING
    if not others:
        return tuple(sorted(always))
    pattern = any_of((*always, *others))
    markers: set[str] = set()
    for roles in _SHAPES:
        markers |= _markers(template, roles, pattern)
    # What stands directly around reasoning is written by the model (a template's own <think>),
    # unless it opens a turn without reasoning just the same.
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}
    plain = template.render_or_empty(question, answer)
    text = template.render_or_empty(question, {**answer, "reasoning_content": _REASON})
    start, end = text.find(_REASON), text.find(_ANSWER)
    after_reasoning = pattern.findall(text, start, end) if 0 <= start < end else []
    if after_reasoning:
        opening = pattern.findall(plain, 0, max(plain.find(_ANSWER), 0))[-1:]
        markers -= {after_reasoning[0], *pattern.findall(text, 0, start)[-1:]} - set(opening)
    return tuple(sorted({*always, *(markers & others)}))


def is_markup(token: str) -> bool:
    """Say whether a token is more than blanks, letters and digits: words and runs of blanks mark
    nothing."""
    return not token.replace(" ", "").isalnum() and bool(token.strip())


def _markers(template: ChatTemplate, roles: tuple[str, ...], pattern: re.Pattern[str]) -> set[str]:
    """Return the tokens that the template prints outside of the answers of one conversation."""
    contents = [f"STAND-IN-{index}." for index in range(len(roles))]
    text = template.render_or_empty(
        *({"role": r, "content": c} for r, c in zip(roles, contents, strict=True))
    )
    prompt = template.generation_prompt()
    starts = [text.find(content) for content in contents]
    if -1 in starts or starts != sorted(starts):
        return set()
    markers: set[str] = set()
    openings: list[set[str]] = []  # of each assistant turn
    ends = [start + len(content) for start, content in zip(starts, contents, strict=True)]
    # the gaps before each content, and the one after the last
    for role, start, end in zip((*roles, ""), (0, *ends), (*starts, len(text)), strict=True):
        if role != "assistant":
            markers |= set(pattern.findall(text, start, end))
            continue
        # The generation prompt is the opening. Without one, all of the gap may be.
        prompted = text.rfind(prompt, start, end) if prompt else -1
        opening = prompted if prompted >= 0 else start
        opening_end = prompted + len(prompt) if prompted >= 0 else end
        markers |= set(pattern.findall(text, start, opening))
        openings.append(set(pattern.findall(text, opening, opening_end)))
    return markers | set.intersection(*openings)
