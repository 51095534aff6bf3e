"""Traced text: the same characters as plain text, and no mark that points to anything but its own
source."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from prep.conversations.conversation import Conversation
from prep.rendering.coverage import unrendered_fields
from prep.rendering.spans import find_spans
from prep.rendering.template import ChatTemplate, TemplateText
from prep.rendering.traced_str import GENERATION, Mark, Traced, TracedDict, join, traced
from prep.rendering.turns import learn_rules
from shared.errors import TemplateError

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
a_text = st.text(alphabet="ab\n \t<>\r\u00e9\u0301\U0001f642,", max_size=12)
a_separator = st.text(alphabet="ab\n ,", min_size=1, max_size=2)
a_bound = st.none() | st.integers(-14, 14)


@st.composite
def some_traced(draw: st.DrawFn) -> tuple[str, Traced, dict[int, str]]:
    """The plain string, the traced string, and the source of each message: traced and plain pieces
    side by side."""
    plain, marks, sources = "", [], {}
    for index in range(draw(st.integers(0, 4))):
        text = draw(a_text)
        if draw(st.booleans()):
            marks.append(Mark(len(plain), len(plain) + len(text), index, "content", 0))
            sources[index] = text
        plain += text
    return plain, Traced(plain, tuple(marks)), sources


def check(result: Any, expected: Any, sources: dict[int, str]) -> None:
    """Equal characters, and every mark points to the same characters of its source."""
    if isinstance(expected, list | tuple):
        assert len(result) == len(expected)
        for one, other in zip(result, expected, strict=True):
            check(one, other, sources)
        return
    assert result == expected
    assert isinstance(result, str)
    for mark in result.marks if isinstance(result, Traced) else ():
        assert 0 <= mark.start <= mark.end <= len(result)
        if mark.source_start >= 0:
            source = sources[mark.message]
            assert (
                result[mark.start : mark.end]
                == source[mark.source_start :][: mark.end - mark.start]
            )


OPERATIONS = {
    "add": lambda text, draw: text + draw(a_text),
    "radd": lambda text, draw: draw(a_text) + text,
    "slice": lambda text, draw: text[draw(a_bound) : draw(a_bound)],
    "step": lambda text, draw: text[:: draw(st.sampled_from([-2, -1, 1, 2]))],
    "strip": lambda text, draw: text.strip(draw(st.none() | a_text)),
    "lstrip": lambda text, draw: text.lstrip(draw(st.none() | a_text)),
    "rstrip": lambda text, draw: text.rstrip(draw(st.none() | a_text)),
    "removeprefix": lambda text, draw: text.removeprefix(draw(a_text)),
    "removesuffix": lambda text, draw: text.removesuffix(draw(a_text)),
    "split": lambda text, draw: text.split(draw(st.none() | a_separator), draw(st.integers(-1, 3))),
    "rsplit": lambda text, draw: text.rsplit(
        draw(st.none() | a_separator), draw(st.integers(-1, 3))
    ),
    "splitlines": lambda text, draw: text.splitlines(draw(st.booleans())),
    "partition": lambda text, draw: text.partition(draw(a_separator)),
    "rpartition": lambda text, draw: text.rpartition(draw(a_separator)),
    "replace": lambda text, draw: text.replace(
        draw(a_text), draw(a_text), draw(st.integers(-1, 3))
    ),
    "join": lambda text, draw: text.join(draw(st.lists(a_text, max_size=3))),
    "iterate": lambda text, draw: list(text),
    "str": lambda text, draw: str(text),
}


class Recorded:
    """Draws once, replays the same arguments for the second of two calls."""

    def __init__(self, draw: st.DataObject) -> None:
        self._draw, self._values, self._at = draw, [], None

    def __call__(self, strategy: st.SearchStrategy[Any]) -> Any:
        if self._at is None:
            self._values.append(self._draw.draw(strategy))
            return self._values[-1]
        self._at += 1
        return self._values[self._at - 1]

    def rewind(self) -> None:
        self._at = 0


@pytest.mark.parametrize("name", OPERATIONS)
@given(text=some_traced(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_an_operation_gives_the_same_characters_and_true_marks(
    name: str, text: tuple[str, Traced, dict[int, str]], data: st.DataObject
) -> None:
    plain, marked, sources = text
    arguments = Recorded(data)
    expected = OPERATIONS[name](plain, arguments)
    arguments.rewind()
    check(OPERATIONS[name](marked, arguments), expected, sources)


@given(text=some_traced(), data=st.data())
@settings(deadline=None, max_examples=300)
def test_chains_of_operations_give_the_same_characters_and_true_marks(
    text: tuple[str, Traced, dict[int, str]], data: st.DataObject
) -> None:
    plain, marked, sources = text
    for _ in range(data.draw(st.integers(1, 5))):
        name = data.draw(st.sampled_from(sorted(OPERATIONS)))
        arguments = Recorded(data)
        expected = OPERATIONS[name](plain, arguments)
        arguments.rewind()
        result = OPERATIONS[name](marked, arguments)
        check(result, expected, sources)
        if isinstance(expected, list | tuple):
            glue = data.draw(a_text)
            plain, marked = glue.join(expected), join(glue, result)
        else:
            plain, marked = expected, result if isinstance(result, Traced) else Traced(result)
        check(marked, plain, sources)


@given(text=some_traced(), separator=some_traced())
def test_a_traced_separator_keeps_its_own_marks(
    text: tuple[str, Traced, dict[int, str]], separator: tuple[str, Traced, dict[int, str]]
) -> None:
    moved = Traced(
        separator[1][:],
        tuple(mark._replace(message=mark.message + 10) for mark in separator[1].marks),
    )
    sources = text[2] | {index + 10: source for index, source in separator[2].items()}
    check(moved.join([text[1], "x", text[1]]), separator[0].join([text[0], "x", text[0]]), sources)


def test_an_empty_piece_belongs_to_the_message_that_it_was_cut_from() -> None:
    two = traced("ab", 0, "content") + "--" + traced("  ", 1, "content")
    (mark,) = two[4:].strip().marks
    assert mark == (0, 0, 1, "content", 2)


def test_an_empty_piece_of_the_template_belongs_to_nobody() -> None:
    assert ("xyz" + traced("ab", 0, "content"))[1:1].marks == ()


def test_keys_and_json_and_repr_have_the_origin_of_their_dict() -> None:
    value = traced({"a": {"<end>": 1}, "list": ["x"]}, 3, "arguments")
    assert value == {"a": {"<end>": 1}, "list": ["x"]}
    (key,) = value["a"]
    assert key.marks == (Mark(0, 5, 3, "arguments/a/<end>", 0),)
    assert str(value) == str({"a": {"<end>": 1}, "list": ["x"]})
    assert str(value).marks == (Mark(0, len(str(value)), 3, "arguments", -1),)
    assert str(value["list"]).marks[0].field == "arguments/list"
    assert json.dumps(value) == '{"a": {"<end>": 1}, "list": ["x"]}'
    assert isinstance(value, TracedDict)


def test_a_field_named_like_a_block_is_not_taken_for_one() -> None:
    conversation = Conversation(
        (
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A", "generation": "G"},
        ),
        None,
        (None, None),
    )
    template = compiled(
        "{% for m in messages %}{% if m.generation %}{{ m.generation ~ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(TemplateError, match="outside its generation block"):
        find_spans(template.render(conversation), conversation, learn_rules(template, ["</s>"]))


# Through Jinja


def compiled(text: str) -> ChatTemplate:
    return ChatTemplate(TemplateText("test", text), SPECIALS)


def conversation_of(*contents: str, **more: Any) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple(
        {"role": roles[i % 2], "content": text, **more} for i, text in enumerate(contents)
    )
    return Conversation(messages, None, (None,) * len(messages))


def as_transformers(text: str, conversation: Conversation, **options: Any) -> str:
    rendered, _ = render_jinja_template(
        [list(conversation.messages)],
        tools=conversation.tools,
        chat_template=text,
        **SPECIALS,
        **options,
    )
    return rendered[0]


KEPT_MARKS = {
    "plus": "{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}",
    "tilde": "{% for m in messages %}{{ '<' ~ m.content ~ 1 ~ none ~ nothing ~ '>' }}{% endfor %}",
    "several expressions": "{% for m in messages %}<{{ m.content }}>{{ loop.index }}{% endfor %}",
    "trim": "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}",
    "strip": "{% for m in messages %}<{{ m.content.strip() }}>{% endfor %}",
    "replace": "{% for m in messages %}<{{ m.content | replace('\\n', '') }}>{% endfor %}",
    "join filter": "{{ messages | map(attribute='content') | join(', ') }}",
    "join filter with attribute": "{{ messages | join(', ', attribute='content') }}",
    "join method": "{{ '; '.join(messages | map(attribute='content') | list) }}",
    "join method in a loop": (
        "{% for m in messages %}{{ '; '.join([m.role, m.content]) }}{% endfor %}"
    ),
    "tojson": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "macro": (
        "{% macro show(x) %}[{{ x }}]{% endmacro %}{% for m in messages %}{{ show(m.content) }}{%"
        " endfor %}"
    ),
    "caller": (
        "{% macro box() %}[{{ caller() }}]{% endmacro %}"
        "{% for m in messages %}{% call box() %}{{ m.content }}{% endcall %}{% endfor %}"
    ),
    "set block": (
        "{% for m in messages %}{% set x %}({{ m.content }}){% endset %}{{ x + '!' }}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(all='') %}{% for m in messages %}{% set ns.all = ns.all + m.content"
        " + '|' %}{% endfor %}{{ ns.all | trim }}"
    ),
    "filter block": (
        "{% for m in messages %}{% filter trim %} {{ m.content }}{% endfilter %}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{%"
        " endfor %}"
    ),
    "generation in a macro": (
        "{% macro show(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ show(m) }}{% endfor %}"
    ),
    "loop over characters": (
        "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}|{% endfor %}"
    ),
    "lines": (
        "{% for m in messages %}{% for l in m.content.split('\\n') %}{{ l }}\n{% endfor %}{%"
        " endfor %}"
    ),
    "conditional": (
        "{% for m in messages %}{{ m.content if m.content is string else 'no' }}{% endfor %}"
    ),
    "default": "{% for m in messages %}{{ m.content | default('x') }}{% endfor %}",
    "slices": "{% for m in messages %}{{ m.content[:3] }}{{ m.content[3:] }}{% endfor %}",
    "first and last": (
        "{% for m in messages %}{{ m.content | first }}{{ m.content[1:-1] }}{{ m.content | last }}"
        "{% endfor %}"
    ),
    "blanks": "{%- for m in messages -%}\n  {{- m.content -}}\n  {%- endfor -%}",
}
LOST_MARKS = {
    "upper": "{% for m in messages %}<{{ m.content | upper }}>{% endfor %}",
    "format": "{% for m in messages %}{{ '<%s>' | format(m.content) }}{% endfor %}",
    "percent": "{% for m in messages %}{{ '<%s>' % m.content }}{% endfor %}",
    "format method": "{% for m in messages %}{{ '<{}>'.format(m.content) }}{% endfor %}",
    "reverse": "{% for m in messages %}{{ (m.content | reverse) | reverse }}{% endfor %}",
    "safe": "{% for m in messages %}{{ m.content | safe }}{% endfor %}",
    "escape": "{% for m in messages %}{{ m.content | e }}{% endfor %}",
    "title": "{% for m in messages %}{{ m.content.title() }}{% endfor %}",
    "indent": "{% for m in messages %}{{ m.content | indent(2) }}{% endfor %}",
    "truncate": "{% for m in messages %}{{ m.content | truncate(5, true, '', 0) }}{% endfor %}",
    "first line": "{% for m in messages %}{{ m.content.split('\\n')[0] }}{% endfor %}",
    "first word dropped": "{% for m in messages %}{{ m.content.partition(' ')[2] }}{% endfor %}",
    "inner words dropped": "{% for m in messages %}{{ m.content[:2] ~ m.content[5:] }}{% endfor %}",
}
MESSAGES = conversation_of(
    "Hi there,\nyou & me ", "Yes,\nof <course>\U0001f642", "And then?\nWhat", "e\u0301nd it\n now"
)


@pytest.mark.parametrize("name", [*KEPT_MARKS, *LOST_MARKS])
def test_traced_rendering_is_that_of_transformers(name: str) -> None:
    text = (KEPT_MARKS | LOST_MARKS)[name]
    expected = as_transformers(text, MESSAGES)
    assert compiled(text).render(MESSAGES) == expected
    assert compiled(text).render_plain(MESSAGES) == expected


@pytest.mark.parametrize("name", KEPT_MARKS)
def test_what_a_template_prints_is_marked_with_its_own_text(name: str) -> None:
    template = compiled(KEPT_MARKS[name])
    text = template.render(MESSAGES)
    assert unrendered_fields(text, MESSAGES, learn_rules(template, ["</s>"])) is None
    for mark in text.marks:
        if mark.message != GENERATION and mark.source_start >= 0:
            source = MESSAGES.messages[mark.message]["content"]
            assert (
                text[mark.start : mark.end] == source[mark.source_start :][: mark.end - mark.start]
            )


@pytest.mark.parametrize("name", LOST_MARKS)
def test_what_loses_its_origin_leaves_the_row_unrendered(name: str) -> None:
    template = compiled(LOST_MARKS[name])
    result = unrendered_fields(template.render(MESSAGES), MESSAGES, learn_rules(template, ["</s>"]))
    assert result in ((0, "user message"), (0, "user.content"))


@given(st.lists(a_text, min_size=1, max_size=4), st.sampled_from(sorted(KEPT_MARKS)))
@settings(deadline=None, max_examples=300)
def test_traced_rendering_is_that_of_transformers_for_any_text(
    contents: list[str], name: str
) -> None:
    conversation = conversation_of(*contents)
    try:
        result: str | None = compiled(KEPT_MARKS[name]).render(conversation)
    except TemplateError:
        result = None
    try:
        expected: str | None = as_transformers(KEPT_MARKS[name], conversation)
    except Exception:  # whatever transformers raises, we refuse the row
        expected = None
    assert result == expected


def test_a_dotted_attribute_of_join_keeps_its_marks() -> None:
    text = "{{ messages | join('|', attribute='inner.name') }}"
    conversation = conversation_of("a", "b", inner={"name": "x"})
    assert compiled(text).render(conversation) == compiled(text).render_plain(conversation) == "x|x"
    assert as_transformers(text, conversation) == "x|x"


@pytest.mark.parametrize(
    "expression", ["1 / 0", "messages[9].content", "[1][5].x", "'a' + 1", "range(10 ** 9)"]
)
def test_whatever_a_template_raises_is_a_refusal(expression: str) -> None:
    with pytest.raises(TemplateError, match="refuses it"):
        compiled("{{ " + expression + " }}").render(conversation_of("a"))


def test_reasoning_has_the_names_that_transformers_gives_it() -> None:
    text = (
        "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }};{%"
        " endfor %}"
    )
    for name in ("reasoning_content", "thinking", "reasoning"):
        messages = (
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", name: "why"},
        )
        conversation = Conversation(messages, None, (None, None))
        assert compiled(text).render(conversation) == as_transformers(text, conversation)
