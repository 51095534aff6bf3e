"""The second method finds the mask that marks give, and finds a mask that is wrong in one token."""

import random
from typing import Any

import numpy as np
import pytest
from foreign_templates import FOREIGN
from known_templates import CHATML, FAMILIES, specials_of, text_of
from rendered_rows import LOOP, custom, spans_of, trained_characters

from prep.conversations.conversation import Conversation, parse_conversation
from prep.rendering.mask_audit import MAX_TURNS, NotComparableError, Window, first_difference
from prep.rendering.mask_audit import windows as audited
from prep.rendering.template import ChatTemplate, TemplateText, shipped_templates
from prep.rendering.turns import SpanRules, learn_rules
from shared.errors import TemplateError

Ready = tuple[ChatTemplate, SpanRules]
PIECES = [
    "a", "b c", " ", "\n", "caf\u00e9", "<think>hm</think>", "</think>", "<|im_end|>", "</s>",
    "<|im_start|>assistant\n", "[INST]", "42", "STAND-IN",
]  # fmt: skip
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"n": 1}}}


# calls, and lists of calls, that are closed by control tokens which end no turn
LISTED_TOKENS = ("<end>", "<call>", "</call>", "</calls>")
LISTED = (
    LOOP + "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}<call>"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "{% if m.tool_calls %}</calls>{% endif %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def ready(name: str) -> Ready:
    if name == "listed calls":
        return custom(LISTED, LISTED_TOKENS)
    if name in FOREIGN:
        template = ChatTemplate(
            TemplateText(name, FOREIGN[name].text), FOREIGN[name].special_tokens
        )
        return template, learn_rules(template, FOREIGN[name].control)
    template = ChatTemplate(TemplateText(name, text_of(name)), specials_of(name))
    return template, learn_rules(template, FAMILIES.get(name, CHATML).control)


def a_conversation(draw: random.Random, turns: int) -> Conversation:
    def text() -> str:
        return "".join(draw.choices(PIECES, k=draw.randint(0, 4)))

    messages: list[dict[str, Any]] = []
    for _ in range(turns):
        answer: dict[str, Any] = {"role": "assistant", "content": text()}
        if draw.random() < 0.2:
            answer["tool_calls"] = [CALL]
        messages += [{"role": "user", "content": text()}, answer]
    return parse_conversation({"messages": messages}, where="row")


def mask_of(marked: str) -> np.ndarray:
    return np.frombuffer(marked.encode(), np.uint8) == ord("T")


def each_character(length: int) -> np.ndarray:
    """The offsets of a tokenizer that makes a token of every character."""
    return np.stack([np.arange(length), np.arange(1, length + 1)], axis=1)


@pytest.mark.parametrize("name", sorted({"listed calls", *FOREIGN, *shipped_templates()}))
def test_both_methods_agree_and_one_wrong_token_is_found(name: str) -> None:
    template, rules = ready(name)
    draw = random.Random(name)
    compared = 0
    for _ in range(100):
        conversation = a_conversation(draw, draw.randint(1, 3))
        try:
            rendered = spans_of(template, rules, conversation)
            expected = list(audited(template, conversation, rendered.text, rules))
        except (TemplateError, NotComparableError):
            continue
        compared += 1
        mask, offsets = mask_of(trained_characters(rendered)), each_character(len(rendered.text))
        assert first_difference(expected, mask, offsets) is None
        window = draw.choice(expected)
        wrong = draw.randrange(max(window.start, 1), window.end)
        mask[wrong] = not mask[wrong]
        assert first_difference(expected, mask, offsets) == wrong
    assert compared >= 10


def test_the_first_and_the_last_turns_of_a_long_conversation_are_compared() -> None:
    template, rules = ready("chatml")
    turns = 3 * MAX_TURNS
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": f"<{i}>"} for i in range(2 * turns)
    ]
    conversation = parse_conversation({"messages": messages}, where="row")
    rendered = spans_of(template, rules, conversation)
    found = list(audited(template, conversation, rendered.text, rules))
    answers = [rendered.text[start:end] for window in found for start, end in window.turns]
    numbers = [2 * turn + 1 for turn in range(turns)]
    chosen = numbers[: MAX_TURNS // 2] + numbers[-MAX_TURNS // 2 :]
    assert answers == [f"<{i}><|im_end|>" for i in chosen]
    # what lies between the two halves is in no window
    assert not any(w.start <= rendered.text.index("<48>") < w.end for w in found)


@pytest.mark.parametrize(
    "text",
    [
        # a text that the template changes has no length to compare
        LOOP + "{{ m.role }}{{ m.content | truncate(3, true, '') }}<end>{% endfor %}",
        # a call without a generation prompt has no beginning
        LOOP + "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<end>{% endfor %}",
    ],
)
def test_what_this_method_cannot_tell_is_not_compared(text: str) -> None:
    template, rules = custom(text)
    answer = {"role": "assistant", "content": "long answer", "tool_calls": [CALL]}
    conversation = parse_conversation(
        {"messages": [{"role": "user", "content": "Q"}, answer]}, where="row"
    )
    with pytest.raises(NotComparableError):
        list(audited(template, conversation, template.render_plain(conversation), rules))


def test_tokens_outside_of_the_windows_and_the_first_one_are_not_compared() -> None:
    offsets = each_character(10)
    window = Window(0, 6, ((4, 6),))
    mask = np.zeros(10, np.bool_)
    mask[[0, 4, 5, 8]] = True
    assert first_difference([window], mask, offsets) is None
    mask[2] = True
    assert first_difference([window], mask, offsets) == 2
