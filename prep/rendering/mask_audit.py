"""The mask of a row a second time, by a method that shares nothing with the first: an audit of one
row in 128.

The first method follows marks through one rendering and counts the bytes of tokens. This one
compares plain renderings, and finds tokens by the character offsets of the Hugging Face tokenizer:

    text           <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nYo.<|im_end|>\\n
    answer crossed out                                                  ###
    messages before it, with the generation prompt                     ^ its turn begins
    the first control token after the difference, if it ends turns                  ^ it ends

With every row audited, both methods agreed on 127 published templates.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.conversations.conversation import Conversation
from prep.rendering.template import BLOCK_BRACKETS, REASONING_NAMES, ChatTemplate
from prep.rendering.turns import SpanRules
from shared.errors import TemplateError

# Of a longer conversation, only the first and the last turns: each costs up to nine renderings of
# the whole, so that all its turns would take quadratic time.
MAX_TURNS = 16
_TEXTS = ("content", "function_calls", *REASONING_NAMES)
# What is crossed out of a text, tried in this order until the template prints the same length:
# everything but inner blanks; <think> tags stay, for which a template may look; blanks at the ends
# stay, which it may trim; both stay.
_CROSSED_OUT = (
    re.compile(r"(?!)()|\A\s+|\s+\Z|\S"),
    re.compile(r"(</?think>)|\A\s+|\s+\Z|\S"),
    re.compile(r"(?!)()|\S"),
    re.compile(r"(</?think>)|\S"),
)
_LETTERS = re.compile(r"(\b(?:true|false|null)\b)|[^\W\d_]+")
# stands for every crossed-out character; a row that contains it is not audited
_STRANGER = "\u2603"


@dataclass(frozen=True, slots=True)
class Window:
    """Characters [start, end) of a text; those in the ranges of `turns` are trained, no others."""

    start: int
    end: int
    turns: tuple[tuple[int, int], ...]


class NotComparableError(Exception):
    """This method cannot tell: other characters in an answer change more than these characters."""


def windows(
    template: ChatTemplate, conversation: Conversation, text: str, rules: SpanRules
) -> Iterator[Window]:
    """Yield which characters of `text`, the plain rendering of a conversation, are trained, around
    each turn of the assistant.

    Raises NotComparableError if this method cannot tell.
    """
    if any(char in text for char in _STRANGER + BLOCK_BRACKETS):
        raise NotComparableError
    turns = [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
    ]
    chosen = (
        turns if len(turns) <= MAX_TURNS else turns[: MAX_TURNS // 2] + turns[-MAX_TURNS // 2 :]
    )
    blocks: list[tuple[int, int]] | None = None
    if rules.has_generation_marks:
        blocks = []
        for start, end in template.generation_blocks(conversation):
            if blocks and start <= blocks[-1][1]:  # blocks that touch count as one
                blocks[-1] = (blocks[-1][0], max(end, blocks[-1][1]))
            else:
                blocks.append((start, end))
    previous, previous_end = -1, 0
    for index in chosen:
        ranges = _turn(template, conversation, index, text, rules, blocks)
        # what lies between two neighbouring turns is compared too; what lies between turns of
        # which some were not chosen is not
        number = turns.index(index)
        start = previous_end if number == previous + 1 else ranges[0][0]
        previous, previous_end = number, ranges[-1][1]
        yield Window(start, len(text) if index == turns[-1] else previous_end, tuple(ranges))


def first_difference(
    expected: list[Window], trained: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64]
) -> int | None:
    """Return the first token, if any, for which `trained`, bool [N], differs from the windows.

    `offsets` are the characters of every token, int64 [N, 2]. The first token is never a target and
    is not compared.
    """
    for window in expected:
        inside = (offsets[:, 0] >= window.start) & (offsets[:, 1] <= window.end)
        in_turns = np.zeros(len(offsets), np.bool_)
        for first, last in window.turns:
            in_turns |= (offsets[:, 0] < last) & (offsets[:, 1] > first)
        differing = np.flatnonzero(inside & (in_turns != trained))
        if len(differing := differing[differing > 0]):
            return int(differing[0])
    return None


def _turn(
    template: ChatTemplate,
    conversation: Conversation,
    index: int,
    text: str,
    rules: SpanRules,
    blocks: list[tuple[int, int]] | None,
) -> list[tuple[int, int]]:
    """Return the trained characters of one assistant message: one range, or one in each of its
    generation blocks."""
    # without a generation prompt, a turn begins with its text
    before = ""
    if index and rules.generation_prompt:
        messages, train = conversation.messages[:index], conversation.train[:index]
        earlier = Conversation(messages, conversation.tools, train)
        before = _plain(template, earlier, add_generation_prompt=True)
    has_calls = bool(conversation.messages[index].get("tool_calls"))
    prompted = len(before) if before and text.startswith(before) else -1
    first, last = _range_of_text(template, conversation, index, text, prompted)
    if blocks is not None:
        touched = [(start, end) for start, end in blocks if start <= last and first <= end]
        if not touched:
            raise NotComparableError
        starts = [
            _after_prompt(text, touched[0][0], first, rules, touched[0][0]),
            *(start for start, _ in touched[1:]),
        ]
        ends = [_end(text, min(last, end), end, end, rules, has_calls) for _, end in touched]
        return list(zip(starts, ends, strict=True))
    if 0 < prompted <= first:
        start = _after_prompt(text, prompted, first, rules, prompted)
    elif has_calls:
        raise NotComparableError  # nothing shows where the words that open a call begin
    else:
        start = _after_prompt(text, 0, first, rules, first)
    limit = len(text)
    if index + 1 < len(conversation.messages):
        limit, _ = _range_of_text(template, conversation, index + 1, text, len(text))
    if has_calls and not any(
        match[0] in rules.closing for match in rules.control.finditer(text, last, limit)
    ):
        raise NotComparableError  # nor where the words that close it end
    return [(start, _end(text, last, limit, last, rules, has_calls))]


def _range_of_text(
    template: ChatTemplate, conversation: Conversation, index: int, text: str, if_empty: int
) -> tuple[int, int]:
    """Return the range of characters that change when the texts of a message are crossed out."""
    for pattern in _CROSSED_OUT:
        crossed = {
            key: _crossed_out(value, pattern) if key in _TEXTS or key == "tool_calls" else value
            for key, value in conversation.messages[index].items()
        }
        messages = (*conversation.messages[:index], crossed, *conversation.messages[index + 1 :])
        other = _plain(template, Conversation(messages, conversation.tools, conversation.train))
        if len(other) == len(text) and all(
            a in (_STRANGER, b) for a, b in zip(other, text, strict=True)
        ):
            break
    else:
        raise NotComparableError
    first = other.find(_STRANGER)
    if first >= 0:
        return first, other.rfind(_STRANGER) + 1
    if if_empty < 0:
        raise NotComparableError
    return if_empty, if_empty


def _crossed_out(value: Any, pattern: re.Pattern[str], key: str = "") -> Any:
    """Return texts with strangers for all that `pattern` matches outside its group; in calls, for
    letters alone."""
    if isinstance(value, str):
        if key in ("type", "id"):
            return value
        return (_LETTERS if key else pattern).sub(
            lambda match: match[1] or _STRANGER * len(match[0]), value
        )
    if isinstance(value, dict):
        return {name: _crossed_out(item, pattern, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_crossed_out(item, pattern, key) for item in value]
    return value


def _after_prompt(text: str, floor: int, first: int, rules: SpanRules, otherwise: int) -> int:
    """Return the end of the last generation prompt, or of what remains of it, before an answer."""
    prompt = rules.generation_prompt
    start = text.rfind(prompt, floor, first) if prompt else -1
    if start >= 0:
        return start + len(prompt)
    markers = rules.control.findall(prompt) if otherwise < first else []
    ends = [text.rfind(m, floor, first) + len(m) for m in markers if m in text[floor:first]]
    return max([otherwise, *ends])


def _end(
    text: str, last: int, limit: int, otherwise: int, rules: SpanRules, has_calls: bool
) -> int:
    """Return where a turn ends whose text ends at `last`: after its terminators, or before any
    other control token.

    Calls are closed by control tokens of their own: the turn extends to the token that ends it.
    """
    tokens = list(rules.control.finditer(text, last, limit))
    closing = next((match for match in tokens if match[0] in rules.closing), None)
    if not has_calls and tokens and closing is not tokens[0]:
        return min(tokens[0].start(), otherwise)
    end = closing.end() if closing else otherwise
    while closing and (closing := rules.control.match(text, end)) and closing[0] in rules.closing:
        end = closing.end()
    return end


def _plain(
    template: ChatTemplate, conversation: Conversation, *, add_generation_prompt: bool = False
) -> str:
    try:
        return template.render_plain(conversation, add_generation_prompt=add_generation_prompt)
    except TemplateError as exc:
        raise NotComparableError from exc
