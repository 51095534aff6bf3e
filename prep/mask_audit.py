"""The mask of a row a second time, by a method that shares nothing with the first: an audit of one row in so many.

The first way follows marks through one render and counts the bytes of tokens. This one compares plain renders, and
takes the tokens from the character offsets of the Hugging Face tokenizer:

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

from prep.conversation import Conversation
from prep.template import BLOCK_BRACKETS, REASONING_NAMES, ChatTemplate
from prep.turns import SpanRules
from shared.errors import TemplateError

MAX_TURNS = 16  # of a longer conversation, the first and the last turns: each costs renders of the whole
_TEXTS = ("content", "function_calls", *REASONING_NAMES)
# what is crossed out of a text: all of it but blanks within; also tags of reasoning kept, which a template may look for;
# also the blanks at its ends, which a template may trim: it prints another length where they are gone
_CROSSED_OUT = (
    re.compile(r"(?!)()|\A\s+|\s+\Z|\S"),
    re.compile(r"(</?think>)|\A\s+|\s+\Z|\S"),
    re.compile(r"(</?think>)|\S"),
)
_LETTERS = re.compile(r"(\b(?:true|false|null)\b)|[^\W\d_]+")
_STRANGER = "\u2603"  # stands for every character of an answer


@dataclass(frozen=True, slots=True)
class Window:
    """Characters [start, end) of a text, of which [turn_start, turn_end) and no others are trained."""

    start: int
    end: int
    turns: tuple[tuple[int, int], ...]


class NotComparableError(Exception):
    """The template prints something else than the same text where an answer's characters are others."""


def windows(template: ChatTemplate, conversation: Conversation, text: str, rules: SpanRules) -> Iterator[Window]:
    """Yield what is trained of `text`, the plain render of a conversation, around each of its assistant's turns.

    Raises NotComparableError where this method cannot say.
    """
    if any(char in text for char in _STRANGER + BLOCK_BRACKETS):
        raise NotComparableError
    turns = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    chosen = turns if len(turns) <= MAX_TURNS else turns[: MAX_TURNS // 2] + turns[-MAX_TURNS // 2 :]
    blocks = template.generation_blocks(conversation) if rules.has_generation_marks else None
    before, end_before = -1, 0
    for index in chosen:
        ranges = _turn(template, conversation, index, text, rules, blocks)
        follows = turns.index(index) == before + 1
        start = end_before if follows else ranges[0][0]
        last = index == turns[-1]
        yield Window(start, len(text) if last else ranges[-1][1], tuple(ranges))
        before, end_before = turns.index(index), ranges[-1][1]


def first_difference(found: list[Window], trained: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64]) -> int | None:
    """Return the first token, if any, of which `trained`, bool [N], says something else than the windows.

    `offsets` are the characters of every token, int64 [N, 2]. The first token is never a target and not compared.
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
    """Return the trained characters of one assistant message: one range, or one in each of its generation blocks."""
    # where no generation prompt says where turns begin, they begin with their text
    before = ""
    if index and rules.generation_prompt:
        before = _plain(template, _first(conversation, index), add_generation_prompt=True)
    prompted = len(before) if before and text.startswith(before) else -1
    first, last = _where_it_stands(template, conversation, index, text, prompted)
    if blocks is not None:
        own = [(start, end) for start, end in blocks if start <= last and first <= end]
        if not own:
            raise NotComparableError
        return [
            (_behind_prompt(text, start, max(first, start), rules, start), _end(text, min(last, end), end, end, rules))
            for start, end in own
        ]
    if 0 < prompted <= first:
        start = prompted
    elif not rules.generation_prompt and conversation.messages[index].get("tool_calls"):
        raise NotComparableError  # what precedes a call, and is part of it, has no bound here
    else:
        start = _behind_prompt(text, 0, first, rules, first)
    limit = len(text)
    if index + 1 < len(conversation.messages):
        limit, _ = _where_it_stands(template, conversation, index + 1, text, len(text))
    if not conversation.messages[index].get("tool_calls"):
        return [(start, _end(text, last, limit, last, rules))]
    ending = next((found for found in rules.control.finditer(text, last, limit) if found[0] in rules.closing), None)
    if ending is None:
        raise NotComparableError
    return [(start, ending.end())]


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
        if len(other) == len(text) and all(a in (_STRANGER, b) for a, b in zip(other, text, strict=True)):
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
    """Return texts with a stranger for what `pattern` finds outside its group; in calls, for their letters alone."""
    if isinstance(value, str):
        if key in ("type", "id"):
            return value
        return (_LETTERS if key else pattern).sub(lambda found: found[1] or _STRANGER * len(found[0]), value)
    if isinstance(value, dict):
        return {name: _crossed_out(item, pattern, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_crossed_out(item, pattern, key) for item in value]
    return value


def _behind_prompt(text: str, floor: int, first: int, rules: SpanRules, otherwise: int) -> int:
    found = text.rfind(rules.generation_prompt, floor, first) if rules.generation_prompt else -1
    return found + len(rules.generation_prompt) if found >= 0 else otherwise


def _end(text: str, last: int, limit: int, otherwise: int, rules: SpanRules) -> int:
    """Return where a turn ends whose text ends at `last`: behind its terminator, or before another control token."""
    found = rules.control.search(text, last, limit)
    if found is None:
        return otherwise
    return found.end() if found[0] in rules.closing else min(found.start(), otherwise)


def _first(conversation: Conversation, count: int) -> Conversation:
    return Conversation(conversation.messages[:count], conversation.tools, conversation.train[:count])


def _plain(template: ChatTemplate, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
    try:
        return template.render_plain(conversation, add_generation_prompt=add_generation_prompt)
    except TemplateError as exc:
        raise NotComparableError from exc
