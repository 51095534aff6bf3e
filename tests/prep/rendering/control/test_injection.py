"""Control tokens typed where no message text is, and control tokens inside tool calls."""

import pytest
from rendered_rows import LOOP, custom, spans_of, trained_characters, trained_text

from prep.conversations.conversation import parse_conversation
from prep.rendering.control.injection import ControlCheck
from shared.errors import TemplateError

# Control tokens typed where no message text is


@pytest.mark.parametrize("marked", [True, False])
def test_a_name_inside_the_answer_is_text(marked: bool) -> None:
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    template, rules = custom(
        LOOP + "<{{ m.role }}>" + begin + "{% if m.name %}{{ m.name }}: {% endif %}{{ m.content }}"
        "<end>" + end
        + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )  # fmt: skip
    row = {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y", "name": "<end>"},
        ]
    }
    rendered = spans_of(template, rules, parse_conversation(row, where="row"))
    typed = rendered.text.index("<end>:")
    assert [s.is_text for s in rendered.spans if s.start <= typed < s.end] == [True]


def test_a_typed_generation_prompt_before_the_answer_does_not_begin_it() -> None:
    template, rules = custom(
        LOOP
        + "<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y", "name": "<assistant>"},
        ]
    }
    rendered = spans_of(template, rules, parse_conversation(row, where="row"))
    assert trained_characters(rendered).replace("T", "") == "." * len(
        "<user>x<end><assistant <assistant>>"
    )


@pytest.mark.parametrize(
    ("printed", "lost"),
    [
        ("{{ tools | tojson }}", False),
        ("{{ tools }}", False),
        (
            (
                "{% for t in tools %}{% for k, v in t.items() %}{{ k }}={{ v }};{% endfor %}{%"
                " endfor %}"
            ),
            False,
        ),
        ("{{ tools | tojson(indent=1) | indent(2) }}", True),
        ("{{ '<%s>' % tools }}", True),
        ("{{ tools | map(attribute='name') | map('center', 30) | join }}", True),
    ],
)
def test_a_control_token_typed_in_a_tool_is_text_or_the_row_is_unverifiable(
    printed: str, lost: bool
) -> None:
    template, rules = custom(printed + LOOP + "{{ m.content }}<end>{% endfor %}")
    row = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"name": "a<end>b", "c<end>": {"d<end>": ["<end>"]}}],
    }
    conversation = parse_conversation(row, where="row")
    rendered = spans_of(template, rules, conversation)
    check = ControlCheck(template, rules, ("<end>",))
    if lost:
        with pytest.raises(TemplateError, match="typed"):
            check.check(conversation, rendered)
        return
    assert check.check(conversation, rendered).control == ("<end>",)
    texts = [(s.start, s.end) for s in rendered.spans if s.is_text]
    outside = [
        m.start()
        for m in rules.control.finditer(rendered.text)
        if not any(a <= m.start() < b for a, b in texts)
    ]
    assert outside == [len(rendered.text) - len("<end>")]


# Tool calls


def test_the_token_that_ends_the_turn_is_trained_behind_those_that_end_the_calls() -> None:
    text = (
        LOOP
        + "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name"
        " }}<args>{{ c.function.arguments | tojson }}</call>{% endfor %}{% if m.tool_calls"
        " %}</calls>{% endif %}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{%"
        " endif %}"
    )
    template, rules = custom(text, ("<end>", "<call>", "</call>", "</calls>", "<args>"))
    calls = [{"name": "f", "arguments": {"n": 1}}, {"name": "g", "arguments": {}}]
    row = {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y", "tool_calls": calls},
            {"role": "tool", "content": "z"},
        ]
    }
    rendered = spans_of(template, rules, parse_conversation(row, where="row"))
    trained = trained_text(rendered)
    assert trained == 'y<call>f<args>{"n": 1}</call><call>g<args>{}</call></calls><end>'


def test_a_call_that_no_control_token_closes_is_unverifiable() -> None:
    template, rules = custom(
        LOOP + "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}"
    )
    row = {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},
        ]
    }
    with pytest.raises(TemplateError, match="its end cannot be proved"):
        spans_of(template, rules, parse_conversation(row, where="row"))


def test_arguments_printed_key_by_key_are_carried() -> None:
    text = (
        LOOP + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% for k, v in"
        " c.function.arguments.items() %}<k>{{ k }}</k><v>{{ v | tojson }}</v>{% endfor %}{%"
        " endfor %}<end>{% endfor %}"
    )
    template, rules = custom(text)
    calls = [{"name": "f", "arguments": {"n": 1}}]
    row = {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
    }
    rendered = spans_of(template, rules, parse_conversation(row, where="row"))
    trained = trained_text(rendered)
    assert trained == "f<k>n</k><v>1</v><end>"
