"""What a chat template prints around messages: what opens an assistant's turn, and which control
tokens end one.

Learned once, from a few conversations with stand-in contents, before the first row. A terminator is
what the template prints after an answer when nothing follows. When something follows, the first
control token after the answer counts as well, unless the next message begins with it:

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

from prep.rendering.template import ChatTemplate

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
    # what precedes the first tool call of a turn, for templates without a generation prompt
    call_opening: str
    control: re.Pattern[str]  # any control token of the tokenizer
    closing: frozenset[str]  # the control tokens that end an assistant's turn
    # how messages of other roles begin, from their first control token on
    openings: tuple[str, ...]
    # the template prints the reasoning of a last turn; earlier turns may lose it by design
    prints_reasoning: bool
    prints_thinking: bool  # the same for reasoning within the content, <think>...</think>


def learn_rules(
    template: ChatTemplate, control_tokens: Sequence[str], terminators: Collection[str] = ()
) -> SpanRules:
    """Probe a template once. `terminators` end a turn whatever else they do."""
    control = any_of(control_tokens)
    prompt = template.generation_prompt()
    closing = frozenset((*_closing(template, control), *terminators))
    openings: set[str] = set()
    for role in ("user", "system", "tool"):
        text = template.render_or_empty(_user(), _assistant(), {"role": role, "content": AGAIN})
        between = _between(text, ANSWER, AGAIN)
        first = next(
            (match for match in control.finditer(between) if match[0] not in closing), None
        )
        # A control token alone does not tell who speaks: the assistant's next text may begin with
        # the same one (<|im_start|>). So words must follow it.
        if first and between[first.end() :].strip():
            openings.add(between[first.start() :])
    # Without a generation prompt nothing tells where a turn begins that has no text but a call: it
    # begins with what the template prints between the question and the name of the call.
    question = template.render_or_empty(_user())
    call = template.render_or_empty(_user(), _assistant("", tool_calls=_calls()))
    has_opening = bool(not prompt and question and call.startswith(question) and CALL in call)
    reasoning = template.render_or_empty(_user(), _assistant(reasoning_content=REASON))
    thinking = template.render_or_empty(
        _user(), _assistant(content=f"<think>{REASON}</think>{ANSWER}")
    )
    return SpanRules(
        has_generation_marks=template.has_generation_marks,
        generation_prompt=prompt,
        call_opening=call[len(question) : call.find(CALL)] if has_opening else "",
        control=control,
        closing=closing,
        openings=tuple(sorted(openings - {prompt})),
        prints_reasoning=REASON in reasoning,
        prints_thinking=REASON in thinking,
    )


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of any of the tokens, the longest first."""
    return re.compile(
        "|".join(map(re.escape, sorted(tokens, key=lambda t: (-len(t), t)))) or r"(?!)"
    )


def _closing(template: ChatTemplate, control: re.Pattern[str]) -> set[str]:
    """Return the control tokens that end an assistant's turn, each learned in one of four ways."""
    question = template.render_or_empty(_user())
    answer = template.render_or_empty(_user(), _assistant())
    before_answer = _between(answer, QUESTION, ANSWER)
    after_question = _after(question, QUESTION)
    # what opens an answer: the token that ends the question is not among it
    openers = set(control.findall(before_answer)) - set(control.findall(after_question)[:1])

    # 1. When nothing follows: the first control token, unless it opens another answer (a generation
    # prompt that is always printed), and the run of tokens that follow it directly.
    at_end = _after(answer, ANSWER)
    closing = set(_without_opening(at_end, before_answer, control)[:1])
    run, match = [], control.search(at_end)
    while match:
        run.append(match[0])
        match = control.match(at_end, match.end())
    if run and run[0] in closing:
        closing |= set(takewhile(lambda token: token not in openers, run[1:]))

    # 2. Before another question: what remains without the opening of a question.
    again = template.render_or_empty(_user(), _assistant(), _user(AGAIN))
    between = _between(again, ANSWER, AGAIN)
    opening = question[: max(question.find(QUESTION), 0)]
    closing |= set(_without_opening(between, opening, control)[:1])

    # 3. The token after an answer that ends a question too.
    ends_question = _without_opening(after_question, before_answer, control)[:1]
    closing |= set(control.findall(between)[:1]) & set(ends_question)

    # 4. Behind a call: tokens that close the call, then those that end its turn. The last one that
    # does not open an answer ends the turn.
    after_call = control.findall(
        _after(template.render_or_empty(_user(), _assistant(tool_calls=_calls())), CALL)
    )
    return closing | set([token for token in after_call if token not in openers][-1:])


def _without_opening(text: str, opening: str, control: re.Pattern[str]) -> list[str]:
    """Return the control tokens of `text` in order, without those at its end that `opening` ends
    with too.

    Two tokens are the same only if what follows them is the same as well, apart from blanks.
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


def _user(content: str = QUESTION) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str = ANSWER, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def _calls() -> list[dict[str, Any]]:
    return [{"id": "standincl", "type": "function", "function": {"name": CALL, "arguments": {}}}]


def _between(text: str, first: str, second: str) -> str:
    start = text.find(first)
    end = text.find(second, start + len(first)) if start >= 0 else -1
    return text[start + len(first) : end] if end >= 0 else ""


def _after(text: str, content: str) -> str:
    at = text.rfind(content)
    return text[at + len(content) :] if at >= 0 else ""
