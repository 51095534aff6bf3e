"""Known formats without {% generation %} blocks train the same text as with them, including tools
and reasoning."""

import re
from typing import Any

import pytest
from known_templates import CHATML, CHATS, FAMILIES, TOOL_CHATS, Row, specials_of, text_of
from rendered_rows import conversation_of, custom, spans_of, trained_characters, trained_text

from prep.conversations.conversation import Conversation, parse_conversation
from prep.rendering.template import ChatTemplate, TemplateText, shipped_templates
from prep.rendering.turns import SpanRules, learn_rules
from shared.shard_format import Kind


def unmarked(name: str) -> tuple[ChatTemplate, SpanRules]:
    text = re.sub(r"\{%- (end)?generation %\}", "", text_of(name))
    template = ChatTemplate(TemplateText(name, text), specials_of(name))
    assert not template.has_generation_marks
    family = FAMILIES.get(name, CHATML)
    return template, learn_rules(template, family.control)


UNMARKED = {name: unmarked(name) for name in shipped_templates()}


def check(name: str, conversation: Conversation, marked: str) -> None:
    rendered = spans_of(*UNMARKED[name], conversation)
    assert rendered.text == marked.replace("⟦", "").replace("⟧", "")
    mask, letter = [], "."
    for character in marked:
        if character in "⟦⟧":
            letter = "T" if character == "⟦" else "."
        else:
            mask.append(letter)
    assert trained_characters(rendered) == "".join(mask)


@pytest.mark.parametrize(("name", "row", "marked"), CHATS)
def test_a_chat_without_marks_is_trained_alike(
    name: str, row: list[tuple[str, str]], marked: str
) -> None:
    check(name, conversation_of(*row), marked)


@pytest.mark.parametrize(("name", "row", "marked"), TOOL_CHATS)
def test_tools_and_reasoning_without_marks_are_trained_alike(
    name: str, row: Row, marked: str
) -> None:
    check(name, parse_conversation(row, where="row"), marked)


# Formats of other well-known models

HARMONY_TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
HARMONY = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- if m.reasoning_content and"
    " loop.last -%}<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content"
    " }}<|end|>{%- endif -%}<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{"
    " '<|return|>' if loop.last else '<|end|>' }}{%- else -%}<|start|>{{ m.role }}<|message|>{{"
    " m.content }}<|end|>{%- endif -%}{%- endfor -%}{%- if add_generation_prompt"
    " -%}<|start|>assistant{%- endif -%}"
)
LISTED_TOKENS = (
    "<BOS>",
    "<EOS>",
    "<User>",
    "<Assistant>",
    "<calls>",
    "</calls>",
    "<call>",
    "</call>",
    "<out>",
    "</out>",
)
# calls and outputs in lists with their own control tokens, as DeepSeek's models have them
LISTED = (
    "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'user' -%}{{ '<User>' + m.content"
    " }}{%- elif m.role == 'assistant' -%}{%- if messages[loop.index0 - 1].role != 'tool'"
    " -%}<Assistant>{%- endif -%}{{ m.content }}{%- if m.tool_calls -%}<calls>{%- for c in"
    " m.tool_calls -%}{{ '<call>' + c.function.name + '\n' }}{{ c.function.arguments if"
    " c.function.arguments is string else c.function.arguments | tojson }}</call>{%- endfor"
    " -%}</calls>{%- endif -%}{{ eos_token }}{%- else -%}{{ '<out>' + m.content + '</out>' }}{%-"
    " endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<Assistant>{%- endif -%}"
)
# environment and tool results merged into one user turn, and a default system prompt
RESULTS_AS_USER = (
    "{%- if messages[0].role != 'system' -%}<|im_start|>system\nBe good.<|im_end|>\n{% endif -%}{%-"
    " for m in messages -%}{%- set is_result = m.role in ['tool', 'environment'] -%}{%- if"
    " is_result -%}{%- if loop.first or messages[loop.index0 - 1].role not in ['tool',"
    " 'environment'] -%}<|im_start|>user{% endif -%}{{ '\n[' + m.content + ']' }}{%- if loop.last"
    " or messages[loop.index0 + 1].role not in ['tool', 'environment'] -%}<|im_end|>\n{% endif"
    " -%}{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content }}{%- for c in m.tool_calls or"
    " [] -%}{{ '\n' + c.function | tojson }}{%- endfor -%}<|im_end|>\n{% endif -%}{%- endfor -%}{%-"
    " if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)
PARTS = [
    {"type": "thinking", "thinking": "hm"},
    {"type": "text", "text": "A"},
    {"type": "text", "text": "B"},
]
BOTH_CALLS = [
    {"name": "f", "arguments": '{"a": "é"}'},
    {"id": "1", "function": {"name": "g", "arguments": {"b": [1]}}},
]


@pytest.mark.parametrize(
    ("text", "control", "eos", "messages", "trained"),
    [
        (HARMONY, HARMONY_TOKENS, "<|return|>",
         [("user", "Q"), ("assistant", "x"), ("user", "R"), ("assistant", PARTS)],
         "<|channel|>final<|message|>x<|end|>"
         "<|channel|>analysis<|message|>hm<|end|>"
         "<|start|>assistant<|channel|>final<|message|>AB<|return|>"),
        (LISTED, LISTED_TOKENS, "<EOS>",
         [("user", "Q"), ("assistant", None, BOTH_CALLS), ("tool", "1"), ("tool", "2"),
          ("assistant", "A")],
         '<calls><call>f\n{"a": "é"}</call><call>g\n{"b": [1]}</call></calls><EOS>A<EOS>'),
        (LISTED, LISTED_TOKENS, "<EOS>",
        [("user", "Q"), ("assistant", "so</call>", BOTH_CALLS[:1])],
         'so</call><calls><call>f\n{"a": "é"}</call></calls><EOS>'),
        (RESULTS_AS_USER, CHATML.control, "<|im_end|>",
         [("user", "Q"), ("assistant", "so", BOTH_CALLS), ("environment", "1"), ("tool", "2"),
         ("assistant", "A")],
         'so\n{"name": "f", "arguments": "{\\"a\\": \\"é\\"}"}\n{"name": "g", "arguments": {"b": '
         '[1]}}<|im_end|>'
         "A<|im_end|>"),
    ],
)  # fmt: skip
def test_formats_of_other_models_train_what_the_assistant_wrote(
    text: str, control: tuple[str, ...], eos: str, messages: list[tuple[Any, ...]], trained: str
) -> None:
    template = ChatTemplate(TemplateText("other", text), {"bos_token": "<BOS>", "eos_token": eos})
    row = [
        dict(zip(("role", "content", "tool_calls"), message, strict=False)) for message in messages
    ]
    rendered = spans_of(
        template, learn_rules(template, control), parse_conversation({"messages": row}, where="row")
    )
    assert trained_text(rendered) == trained
    results = [rendered.text[s.start : s.end] for s in rendered.spans if s.kind == Kind.TOOL]
    assert results == [content for role, content, *_ in messages if role in ("tool", "environment")]


def test_reasoning_that_only_the_last_turn_shows_counts_as_printed() -> None:
    template, rules = custom(HARMONY, HARMONY_TOKENS)
    answer = {"role": "assistant", "content": "A", "reasoning_content": "hm"}
    question = {"role": "user", "content": "Q"}
    row = parse_conversation({"messages": [question, answer] * 2}, where="row")
    assert trained_text(spans_of(template, rules, row)).count("hm") == 1


KEEPS_LAST_THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
)


def test_thinking_in_the_text_that_only_the_last_turn_shows_counts_as_printed() -> None:
    template, rules = custom(KEEPS_LAST_THINKING)
    answer = ("assistant", "<think>hm</think>A")
    rendered = spans_of(
        template, rules, conversation_of(("user", "Q"), answer, ("user", "R"), answer)
    )
    assert trained_text(rendered) == "A<end><think>hm</think>A<end>"
