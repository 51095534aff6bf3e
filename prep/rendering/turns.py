"""What a chat template prints around messages: what opens an assistant's turn, and which control
tokens end one.

Learnt once, from a few conversations with stand-in contents, before the first row. A terminator is
what the template prints behind an answer when nothing follows. Where something follows, the first
control token behind an answer counts as well if the next message does not begin with it:

    when nothing follows  Yo.<|im_end|>\\n                      -> <|im_end|>
    before a question     Yo.<|im_end|>\\n<|im_start|>user\\nHi  -> <|im_end|>
    no terminator at all  Yo.\\n<|im_start|>user\\nHi            -> none
    a run of them         Yo.<|END_RESPONSE|><|END_OF_TURN|>   -> both: a model stops at the last

Templates of the GLM family end a turn with the token that opens the next one:
`template.terminators` names such tokens.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from prep.conversations.conversation import Conversation
from prep.rendering.template import ChatTemplate
from shared.errors import TemplateError

QUESTION, ANSWER, REASON, CALL, AGAIN = (
    "STAND-IN-QUESTION",
    "STAND-IN-ANSWER",
    "STAND-IN-REASON",
    "STAND-IN-CALL",
    "QQ",
)


@dataclass(frozen=True, slots=True)
class SpanRules:
    """What is known of a template and its tokenizer before the first row."""

    has_generation_marks: bool
    generation_prompt: str
    # what precedes the first tool call of a turn where no generation prompt says where turns begin
    call_opening: str
    control: re.Pattern[str]  # any control token of the tokenizer
    closing: frozenset[str]  # the control tokens that end an assistant's turn
    openings: tuple[
        str, ...
    ]  # how messages of other roles begin, from their first control token on
    # the template prints the reasoning of a last turn; earlier turns may lose it by design
    carries_reasoning: bool
    carries_thinking: bool  # likewise for reasoning that stands in the content, <think>...</think>


def learn_rules(
    template: ChatTemplate, control_tokens: Sequence[str], terminators: Collection[str] = ()
) -> SpanRules:
    """Probe a template once. `terminators` end a turn whatever else they do."""
    control = any_of(control_tokens)
    prompt = template.generation_prompt()
    closing = frozenset((*_closing(template, control), *terminators))
    reasoning = _rendered(template, _user(), _assistant(reasoning_content=REASON))
    thinking = _rendered(template, _user(), _assistant(content=f"<think>{REASON}</think>{ANSWER}"))
    return SpanRules(
        has_generation_marks=template.has_generation_marks,
        generation_prompt=prompt,
        call_opening="" if prompt else _call_opening(template),
        control=control,
        closing=closing,
        openings=tuple(sorted(_openings(template, control, closing) - {prompt})),
        carries_reasoning=REASON in reasoning,
        carries_thinking=REASON in thinking,
    )


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of any of the tokens, the longest first."""
    return re.compile(
        "|".join(map(re.escape, sorted(tokens, key=lambda t: (-len(t), t)))) or r"(?!)"
    )


def _closing(template: ChatTemplate, control: re.Pattern[str]) -> set[str]:
    closing = set()
    asked, answered = _rendered(template, _user()), _rendered(template, _user(), _assistant())
    before_answer = _between(answered, QUESTION, ANSWER)
    behind_question = _behind(asked, QUESTION)
    openers = set(control.findall(before_answer)) - set(control.findall(behind_question)[:1])
    at_end = _behind(answered, ANSWER)
    first, *others = [*_first_run(at_end, control), ""]
    closing |= set(_without_opening(at_end, before_answer, control)[:1])
    closing |= (
        set(takewhile(lambda token: token and token not in openers, others))
        if first in closing
        else set()
    )
    # before another question: what remains when the opening of a question is taken away, or what
    # ends a question too
    between = _between(_rendered(template, _user(), _assistant(), _user(AGAIN)), ANSWER, AGAIN)
    opening = asked[: max(asked.find(QUESTION), 0)]
    closing |= set(_without_opening(between, opening, control)[:1])
    after_question = _without_opening(behind_question, before_answer, control)[:1]
    closing |= set(control.findall(between)[:1]) & set(after_question)
    # a call is closed by tokens of its own, then its turn is: by the last one that does not open an
    # answer
    behind_call = control.findall(
        _behind(_rendered(template, _user(), _assistant(tool_calls=_calls())), CALL)
    )
    closing |= set([token for token in behind_call if token not in openers][-1:])
    return closing


def _first_run(text: str, control: re.Pattern[str]) -> list[str]:
    """Return the first control token of a text, and those that follow it without a character
    between."""
    run: list[str] = []
    found = control.search(text)
    while found:
        run.append(found[0])
        found = control.match(text, found.end())
    return run


def _without_opening(text: str, opening: str, control: re.Pattern[str]) -> list[str]:
    """Return the control tokens of `text`, less those at its end with which `opening` ends as well,
    in order.

    Tokens count as the same only where what follows them is the same too, but for blanks.
    """
    tokens, texts = control.findall(text), control.split(text)
    others, other_texts = control.findall(opening), control.split(opening)
    while (
        tokens
        and others
        and (texts.pop().strip(), tokens[-1]) == (other_texts.pop().strip(), others[-1])
    ):
        tokens.pop()
        others.pop()
    return tokens


def _openings(
    template: ChatTemplate, control: re.Pattern[str], closing: Collection[str]
) -> set[str]:
    """Return how messages of other roles begin behind an answer."""
    openings = set()
    for role in ("user", "system", "tool"):
        text = _rendered(template, _user(), _assistant(), {"role": role, "content": AGAIN})
        between = _between(text, ANSWER, AGAIN)
        first = next(
            (found for found in control.finditer(between) if found[0] not in closing), None
        )
        # a control token alone does not say who speaks: an assistant's next text may begin so too
        if first and between[first.end() :].strip():
            openings.add(between[first.start() :])
    return openings


def _call_opening(template: ChatTemplate) -> str:
    text, asked = (
        _rendered(template, _user(), _assistant("", tool_calls=_calls())),
        _rendered(template, _user()),
    )
    return (
        text[len(asked) : text.find(CALL)]
        if asked and text.startswith(asked) and CALL in text
        else ""
    )


def _user(content: str = QUESTION) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str = ANSWER, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def _calls() -> list[dict[str, Any]]:
    return [{"id": "standincl", "type": "function", "function": {"name": CALL, "arguments": {}}}]


def _rendered(template: ChatTemplate, *messages: dict[str, Any]) -> str:
    """Return what the template prints, "" where it refuses."""
    try:
        return template.render_plain(
            Conversation(messages=messages, tools=None, train=(None,) * len(messages))
        )
    except TemplateError:
        return ""


def _between(text: str, first: str, second: str) -> str:
    start = text.find(first)
    end = text.find(second, start + len(first)) if start >= 0 else -1
    return text[start + len(first) : end] if end >= 0 else ""


def _behind(text: str, content: str) -> str:
    at = text.rfind(content)
    return text[at + len(content) :] if at >= 0 else ""
