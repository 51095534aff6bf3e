"""A compiled template prints what Jinja prints, with the same spans, or leaves the row to Jinja."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.conversations.conversation import Conversation
from prep.rendering.compiled.template import CompiledTemplate
from prep.rendering.control.injection import ControlCheck
from prep.rendering.coverage import unrendered_fields
from prep.rendering.spans import find_spans
from prep.rendering.template import ChatTemplate, TemplateText, shipped_templates
from prep.rendering.turns import learn_rules
from shared.errors import TemplateError

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>"]
TOKENS = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
THINKING = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{%- if m.role == 'assistant' and '</think>'"
    " in m.content -%}{{ m.content.split('</think>')[-1].lstrip('\n') }}{%- else -%}{{ m.content"
    " }}{%- endif -%}<|im_end|>\n{%- endfor -%}"
)
TRIMMING = (
    "{%- for m in messages -%}<|im_start|>{{ m.role + '\n' + m.content | trim }}<|im_end|>\n{%-"
    " endfor -%}"
)
FILLED = (
    "{%- for m in messages -%}{%- if m.content -%}<|im_start|>{{ m.role }}\n{{ m.content"
    " }}<|im_end|>\n{%- endif -%}{%- endfor -%}"
)
QUESTIONS = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}{{ '!' if m.content.startswith('a') or"
    " m.content == 'b c' }}\n{{ m.content }}<|im_end|>\n{%- endfor -%}"
)
LENGTH = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ 'long' if m.content | length > 20 }}"
    "{{ m.content }}<|im_end|>\n{%- endfor -%}"
)
FIRST = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ 'A' if m.content[:1] == 'a' }}"
    "{{ m.content }}<|im_end|>\n{%- endfor -%}"
)
JOINED = (
    "{%- set ns = namespace(text='') -%}{%- for m in messages -%}{%- set ns.text = ns.text +"
    " '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -%}{%- endfor -%}{{ 'hello' if 'a"
    " b' in ns.text }}{{ ns.text }}"
)
LOOK = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ '!' if LOOK }}{{ m.content"
    " }}<|im_end|>\n{%- endfor -%}"
)
# each is answered in C, without a call of the string's methods
PAST_METHODS = [
    "m.content in 'a b c'",
    "m.content not in 'a b c'",
    "m.content is in 'a b c'",
    "messages | selectattr('content', 'in', 'a b c') | list",
    "'abc'.startswith(m.content)",
    "'abc'.find(m.content) == 0",
    "'a b c'.replace(m.content, '') == ''",
    "'a b c' | trim(m.content) == 'b'",
    "'%s%s' % (m.content, '') == 'a'",
    "'%(x)s' % {'x': m.content} == 'a'",
    "'{content}'.format_map(m) == 'a'",
    "''.join([m.content]) == 'a'",
    "(messages | map(attribute='content') | join(' ')) == 'a'",
    "(m.content | tojson) == '\"a\"'",
    "'\"a\"' in (messages | tojson)",
    "\"'a'\" in (m | string)",
    "\"'a'\" in m ~ ''",
    "messages | map(attribute='content') | map('wordcount') | first > 1",
    "m.content is sameas ''",
    "m.content == messages[0].content",
]
BACKWARDS = "{%- for m in messages | reverse -%}{{ m.content }}{%- endfor -%}"
ROLE_FILTER = (
    "{%- for m in messages -%}{{ m.role | title }}: {{ m.content }}<|im_end|>\n{%- endfor -%}"
)
OWN = {name: path.read_text().removesuffix("\n") for name, path in shipped_templates().items()}
COMPILABLE = {
    **OWN,
    "thinking": THINKING,
    "trimming": TRIMMING,
    "filled": FILLED,
    "questions": QUESTIONS,
    "role": ROLE_FILTER,
}
NOT_COMPILABLE = {
    "length": LENGTH,
    "first": FIRST,
    "joined": JOINED,
    "backwards": BACKWARDS,
    **{look: LOOK.replace("LOOK", look) for look in PAST_METHODS},
}

PIECES = [
    "a",
    "b c",
    " ",
    "\n",
    "",
    "</think>",
    "<think>",
    "<|im_end|>",
    "caf\u00e9",
    "{{ x }}",
    "\u2028",
    "a b a b a b a b a b",
]
CONTENTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
ROLES = st.lists(st.sampled_from(["user", "assistant", "system"]), min_size=1, max_size=5)


def compiled_of(text: str) -> tuple[ChatTemplate, CompiledTemplate]:
    template = ChatTemplate(TemplateText("test", text), TOKENS)
    return template, CompiledTemplate(template, learn_rules(template, CONTROL))


COMPILED = {name: compiled_of(text) for name, text in {**COMPILABLE, **NOT_COMPILABLE}.items()}


def conversation(roles: list[str], contents: list[str]) -> Conversation:
    messages = tuple(
        {"role": role, "content": text} for role, text in zip(roles, contents, strict=True)
    )
    return Conversation(messages, None, (None,) * len(roles))


@pytest.mark.parametrize("name", sorted(COMPILED))
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_compiled_rendering_equals_the_traced_one(name: str, data: st.DataObject) -> None:
    template, compiled = COMPILED[name]
    roles = data.draw(ROLES)
    row = conversation(roles, [data.draw(CONTENTS) for _ in roles])
    rendered = compiled.render(row)
    if rendered is None:
        return
    rules = learn_rules(template, CONTROL)
    text = template.render(row)
    assert unrendered_fields(text, row, rules) is None
    traced = find_spans(text, row, rules)
    assert rendered == ControlCheck(template, rules, CONTROL).check(row, traced)


@pytest.mark.parametrize("name", sorted(COMPILABLE))
def test_ordinary_conversations_need_no_jinja(name: str) -> None:
    assert (
        COMPILED[name][1].render(
            conversation(["user", "assistant"] * 2, ["Hi", "Yo", "Why?", "So."])
        )
        is not None
    )


@pytest.mark.parametrize("name", sorted(NOT_COMPILABLE))
def test_a_template_whose_questions_cannot_be_repeated_is_not_compiled(name: str) -> None:
    assert COMPILED[name][1].render(conversation(["user", "assistant"], ["Hi", "Yo"])) is None


def test_a_template_with_other_filters_is_not_compiled() -> None:
    _, compiled = compiled_of(
        "{%- for m in messages -%}{{ m.role }}: {{ m.content }}{{ m.content | wordcount }}{%-"
        " endfor -%}"
    )
    assert compiled.render(conversation(["user"], ["Hi"])) is None


def test_roles_that_the_template_refuses_are_left_to_jinja() -> None:
    text = (
        "{%- if messages[0].role != 'user' -%}{{ raise_exception('user first') }}{%- endif -%}{{"
        " messages[0].content }}"
    )
    template, compiled = compiled_of(text)
    row = conversation(["assistant", "user"], ["Hi", "Yo"])
    assert compiled.render(row) is None
    with pytest.raises(TemplateError, match="user first"):
        template.render(row)


@pytest.mark.parametrize(
    "extra",
    [
        {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"reasoning_content": "x"},
        {"name": "n"},
    ],
)
def test_a_message_with_more_than_role_and_content_is_left_to_jinja(extra: dict) -> None:
    row = conversation(["user", "assistant"], ["Hi", "Yo"])
    row.messages[1].update(extra)
    assert COMPILED["chatml"][1].render(row) is None
