"""The mask of a row a second time, by a method that shares nothing with the first: an audit of one
row in so many.

The first way follows marks through one render and counts the bytes of tokens. This one compares
plain renders, and takes the tokens from the character offsets of the Hugging Face tokenizer:

    text           <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nYo.<|im_end|>\\n
    answer crossed out                                                  ###
    messages before it, with the generation prompt                     ^ here its turn begins
    the first control token behind what differs, if it ends turns                   ^ here it ends
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

MAX_TURNS = (
    16  # of a longer conversation, the first and the last turns: each costs renders of the whole
)
_TEXTS = ("content", "function_calls", *REASONING_NAMES)
# what is crossed out of a text, one after the other until the template prints the same length: all
# but blanks within; tags of reasoning kept, which it may look for; the blanks at the ends kept,
# which it may trim; both kept
_CROSSED_OUT = (
    re.compile(r"(?!)()|\A\s+|\s+\Z|\S"),
    re.compile(r"(</?think>)|\A\s+|\s+\Z|\S"),
    re.compile(r"(?!)()|\S"),
    re.compile(r"(</?think>)|\S"),
)
_LETTERS = re.compile(r"(\b(?:true|false|null)\b)|[^\W\d_]+")
_STRANGER = "\u2603"  # stands for every character of an answer


@dataclass(frozen=True, slots=True)
class Window:
    """Characters [start, end) of a text, of which [turn_start, turn_end) and no others are
    trained."""

    start: int
    end: int
    turns: tuple[tuple[int, int], ...]


class NotComparableError(Exception):
    """The template prints something else than the same text where an answer's characters are
    others."""


def windows(
    template: ChatTemplate, conversation: Conversation, text: str, rules: SpanRules
) -> Iterator[Window]:
    """Yield what is trained of `text`, the plain render of a conversation, around each of its
    assistant's turns.

    Raises NotComparableError where this method cannot say.
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
    blocks = template.generation_blocks(conversation) if rules.has_generation_marks else None
    before, end_before = -1, 0
    for index in chosen:
        ranges = _turn(template, conversation, index, text, rules, blocks)
        follows = turns.index(index) == before + 1
        start = end_before if follows else ranges[0][0]
        last = index == turns[-1]
        yield Window(start, len(text) if last else ranges[-1][1], tuple(ranges))
        before, end_before = turns.index(index), ranges[-1][1]


def first_difference(
    found: list[Window], trained: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64]
) -> int | None:
    """Return the first token, if any, of which `trained`, bool [N], says something else than the
    windows.

    `offsets` are the characters of every token, int64 [N, 2]. The first token is never a target and
    not compared.
    """
    for window in found:
        inside = (offsets[:, 0] >= window.start) & (offsets[:, 1] <= window.end)
        expected = np.zeros(len(offsets), np.bool_)
        for first, last in window.turns:
            expected |= (offsets[:, 0] < last) & (offsets[:, 1] > first)
        differing = np.flatnonzero(inside & (expected != trained))
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
    # where no generation prompt says where turns begin, they begin with their text
    before = ""
    if index and rules.generation_prompt:
        before = _plain(template, _first(conversation, index), add_generation_prompt=True)
    has_calls = bool(conversation.messages[index].get("tool_calls"))
    prompted = len(before) if before and text.startswith(before) else -1
    first, last = _where_it_stands(template, conversation, index, text, prompted)
    if blocks is not None:
        own = [(start, end) for start, end in _joined(blocks) if start <= last and first <= end]
        if not own:
            raise NotComparableError
        starts = [
            _behind_prompt(text, own[0][0], first, rules, own[0][0]),
            *(start for start, _ in own[1:]),
        ]
        ends = [_end(text, min(last, end), end, end, rules, has_calls) for _, end in own]
        return list(zip(starts, ends, strict=True))
    if 0 < prompted <= first:
        start = _behind_prompt(text, prompted, first, rules, prompted)
    elif has_calls:
        raise NotComparableError  # what precedes a call, and is part of it, has no bound here
    else:
        start = _behind_prompt(text, 0, first, rules, first)
    limit = len(text)
    if index + 1 < len(conversation.messages):
        limit, _ = _where_it_stands(template, conversation, index + 1, text, len(text))
    if has_calls and not any(
        found[0] in rules.closing for found in rules.control.finditer(text, last, limit)
    ):
        raise NotComparableError  # nor has what closes a call
    return [(start, _end(text, last, limit, last, rules, has_calls))]


def _where_it_stands(
    template: ChatTemplate, conversation: Conversation, index: int, text: str, if_empty: int
) -> tuple[int, int]:
    """Return the first and last character that differ where a message's texts are crossed out."""
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
    places = [place for place, char in enumerate(other) if char == _STRANGER]
    if places:
        return places[0], places[-1] + 1
    if if_empty < 0:
        raise NotComparableError
    return if_empty, if_empty


def _crossed_out(value: Any, pattern: re.Pattern[str], key: str = "") -> Any:
    """Return texts with a stranger for what `pattern` finds outside its group; in calls, for their
    letters alone."""
    if isinstance(value, str):
        if key in ("type", "id"):
            return value
        return (_LETTERS if key else pattern).sub(
            lambda found: found[1] or _STRANGER * len(found[0]), value
        )
    if isinstance(value, dict):
        return {name: _crossed_out(item, pattern, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_crossed_out(item, pattern, key) for item in value]
    return value


def _behind_prompt(text: str, floor: int, first: int, rules: SpanRules, otherwise: int) -> int:
    """Return the end of the last generation prompt, or of what remains of it, before an answer."""
    found = text.rfind(rules.generation_prompt, floor, first) if rules.generation_prompt else -1
    if found >= 0:
        return found + len(rules.generation_prompt)
    markers = rules.control.findall(rules.generation_prompt) if otherwise < first else []
    return max(
        [
            otherwise,
            *(text.rfind(m, floor, first) + len(m) for m in markers if m in text[floor:first]),
        ]
    )


def _end(
    text: str, last: int, limit: int, otherwise: int, rules: SpanRules, has_calls: bool
) -> int:
    """Return where a turn ends whose text ends at `last`: behind its terminators, or before another
    control token.

    Behind calls come tokens that close these; the turn goes on to the one that ends it.
    """
    behind = list(rules.control.finditer(text, last, limit))
    closing = next((found for found in behind if found[0] in rules.closing), None)
    if not has_calls and behind and closing is not behind[0]:
        return min(behind[0].start(), otherwise)
    end = closing.end() if closing else otherwise
    while closing and (closing := rules.control.match(text, end)) and closing[0] in rules.closing:
        end = closing.end()
    return end


def _joined(blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return blocks that touch one another as one."""
    joined: list[tuple[int, int]] = []
    for start, end in blocks:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _first(conversation: Conversation, count: int) -> Conversation:
    return Conversation(
        conversation.messages[:count], conversation.tools, conversation.train[:count]
    )


def _plain(
    template: ChatTemplate, conversation: Conversation, *, add_generation_prompt: bool = False
) -> str:
    try:
        return template.render_plain(conversation, add_generation_prompt=add_generation_prompt)
    except TemplateError as exc:
        raise NotComparableError from exc
