"""What a template drops of a conversation is named: a whole message, or the first field of one."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_templates import CHATML, FAMILIES, specials_of, text_of
from rendered_rows import LOOP, conversation_of, custom

from prep.conversations.conversation import parse_conversation
from prep.rendering.coverage import all_unrendered, unrendered_fields, without_messages
from prep.rendering.template import ChatTemplate, TemplateText
from prep.rendering.turns import learn_rules

USER = {"role": "user", "content": "Q"}
THINKING = {"role": "assistant", "content": "A", "reasoning_content": "hm"}
CALL = {"id": "abcdefghi", "name": "f", "arguments": {}}
CALLING = {"role": "assistant", "content": "so", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("tulu", [USER, {"role": "tool", "content": "1"}], "tool message"),
        ("zephyr", [USER, {"role": "environment", "content": "1"}], "environment message"),
        ("olmo", [USER, {"role": "tool", "content": "1"}], "tool message"),
        ("tulu", [USER, CALLING], "assistant.tool_calls"),
        (
            "chatml",
            [USER, {"role": "assistant", "content": "x", "function_calls": "f()"}],
            "assistant.function_calls",
        ),
        ("chatml", [USER, THINKING], "assistant.reasoning_content"),
        (
            "chatml",
            [USER, {"role": "assistant", "content": "x", "thinking": "r"}],
            "assistant.reasoning_content",
        ),
        ("chatml", [{"role": "user", "content": "x", "functions": "[f]"}], "user.functions"),
        ("tulu_thinker", [USER, THINKING], "assistant.reasoning_content"),
        (
            "tulu_thinker_r1_style",
            [USER, {"role": "assistant", "content": "<think>x</think>y"}],
            "assistant.content",
        ),
        ("simple_concat_with_space", [USER, CALLING], "assistant.tool_calls"),
        ("llama3", [USER, CALLING], "assistant.tool_calls"),
        ("llama3", [USER, THINKING], "assistant.reasoning_content"),
        ("llama3.1", [USER, CALLING], "assistant.content"),
        ("mistral", [USER, CALLING], "assistant.content"),
        ("mistral", [USER, THINKING], "assistant.reasoning_content"),
        ("gemma", [USER, CALLING], "assistant.tool_calls"),
        ("qwen2.5", [USER, THINKING], "assistant.reasoning_content"),
        ("qwen2.5", [{"role": "environment", "content": "1"}], "environment message"),
        ("qwen3", [{"role": "environment", "content": "1"}], "environment message"),
        (
            "qwen3",
            [USER, {"role": "assistant", "content": "x", "function_calls": "f()"}],
            "assistant.function_calls",
        ),
        ("olmo_thinker", [USER, THINKING], "assistant.reasoning_content"),
        (
            "olmo_thinker_remove_intermediate_thinking",
            [
                USER,
                {"role": "assistant", "content": "a</think>b"},
                USER,
                {"role": "tool", "content": "1"},
            ],
            "tool message",
        ),
    ],
)
def test_what_a_shipped_template_drops_is_named(
    name: str, messages: list[dict[str, Any]], reason: str
) -> None:
    template = ChatTemplate(TemplateText(name, text_of(name)), specials_of(name))
    rules = learn_rules(template, FAMILIES.get(name, CHATML).control)
    conversation = parse_conversation({"messages": messages}, where="row")
    missing = unrendered_fields(template.render(conversation), conversation, rules)
    assert missing == (len(messages) - 1, reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            LOOP + "{% if m.role != 'system' %}{{ m.content }}<end>{% endif %}{% endfor %}",
            "system message",
        ),
        (
            LOOP
            + "{{ m.role }}{% if m.role != 'user' %}{{ m.content }}<end>{% endif %}{% endfor %}",
            "user message",
        ),
        ("{% for m in messages[1:] %}{{ m.content }}<end>{% endfor %}", "system message"),
        (LOOP + "{{ m.content[:3] }}<end>{% endfor %}", "assistant.content"),
        (LOOP + "{{ m.content.split('</think>')[-1] }}<end>{% endfor %}", "assistant.content"),
    ],
)
def test_what_a_foreign_template_drops_is_named(text: str, reason: str) -> None:
    template, rules = custom(text)
    row = conversation_of(("system", "Sys"), ("user", "Q"), ("assistant", "<think>hm</think>Yes"))
    missing = unrendered_fields(template.render(row), row, rules)
    assert missing is not None
    assert missing[1] == reason


KEEPS_LAST_REASONING = (
    LOOP + "<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<end>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        # an earlier turn is meant to be forgotten
        (["<think>a</think>b", "c"], None),
        (["a</think>b", "c"], None),
        # the last turn must keep its reasoning
        (["c", "<think>a</think>b"], "assistant.content"),
        # with two ends it is not reasoning: something is missing
        (["a</think>b</think>c", "d"], "assistant.content"),
    ],
)
def test_only_the_reasoning_of_earlier_turns_may_be_forgotten(
    answers: list[str], reason: str | None
) -> None:
    template, rules = custom(KEEPS_LAST_REASONING)
    row = conversation_of(
        ("user", "x"), ("assistant", answers[0]), ("user", "y"), ("assistant", answers[1])
    )
    missing = unrendered_fields(template.render(row), row, rules)
    assert (missing and missing[1]) == reason


# prints a message without the characters that DROPPED gives: index of the message -> [first, last)
DROPS_SOME = (
    LOOP + "<{{ m.role }}>{% set gap = DROPPED.get(loop.index0, (0, 0)) %}"
    "{{ m.content[: gap[0]] ~ m.content[gap[1] :] }}<end>{% endfor %}"
)
a_content = st.text("ab \n", min_size=1, max_size=8)


@given(contents=st.lists(a_content, min_size=1, max_size=5), data=st.data())
@settings(deadline=None, max_examples=60)
def test_exactly_the_messages_that_lose_more_than_blanks_are_named(
    contents: list[str], data: st.DataObject
) -> None:
    a_gap = st.tuples(st.integers(0, 8), st.integers(0, 8)).map(sorted).map(tuple)
    dropped = data.draw(st.dictionaries(st.integers(0, len(contents) - 1), a_gap, max_size=3))
    template, rules = custom(DROPS_SOME.replace("DROPPED", str(dropped)))
    row = conversation_of(*(("user", content) for content in contents))
    missing = dict(all_unrendered(template.render(row), row, rules))
    lost = {at: contents[at][first:last] for at, (first, last) in dropped.items()}
    assert set(missing) == {at for at, text in lost.items() if text.strip()}
    assert set(missing.values()) <= {"user.content"}
    rest = without_messages(row, missing)
    assert [m["content"] for m in rest.messages] == [
        content for at, content in enumerate(contents) if at not in missing
    ]
