"""Whatever filter, test or operator a template applies to a content: it prints what Jinja prints,
or it is not compiled."""

import jinja2.defaults
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.conversations.conversation import Conversation
from prep.rendering.compiled.template import CompiledTemplate
from prep.rendering.template import ChatTemplate, TemplateText
from prep.rendering.turns import learn_rules

ARGUMENTS = {
    "attr": "'strip'", "batch": "2", "center": "9", "default": "'x'", "d": "'x'",
    "format": "'x'", "groupby": "0", "indent": "2", "join": "'-'", "map": "'upper'",
    "reject": "'eq', 'a'", "rejectattr": "'x'", "replace": "'a', 'b'", "round": "1",
    "select": "'eq', 'a'", "selectattr": "'x'", "slice": "2", "truncate": "2, true, ''",
    "wordwrap": "2", "divisibleby": "2", "eq": "'a'", "equalto": "'a'", "==": "'a'", "ne": "'a'",
    "!=": "'a'", "lt": "'b'", "lessthan": "'b'", "<": "'b'", "le": "'a'", "<=": "'a'",
    "gt": "'b'", "greaterthan": "'b'", ">": "'b'", "ge": "'a'", ">=": "'a'", "in": "['a', 'b']",
    "sameas": "'a'", "test": "'b'", "filter": "'b'",
}  # fmt: skip
# deprecated by Jinja or unable to take a text
SKIPPED = {"pprint", "random", "urlize", "xmlattr"}
FILTERS = sorted(set(jinja2.defaults.DEFAULT_FILTERS) - SKIPPED)
TESTS = sorted(name for name in jinja2.defaults.DEFAULT_TESTS if name.isalpha())


def called(name: str) -> str:
    return f"{name}({ARGUMENTS[name]})" if name in ARGUMENTS else name


EXPRESSIONS = [
    *(f"m.content | {called(name)}" for name in FILTERS),
    *(f"m.content is {called(name)}" for name in TESTS),
    *(f"'a b' | {name}(m.content)" for name in FILTERS),
    *(f"'a' is {name}(m.content)" for name in TESTS),
    *(f"messages | map(attribute='content') | {called(name)}" for name in FILTERS),
    *(f"m.content {operator} 'a'" for operator in ("<", ">", "in", "not in", "~", "+", "==")),
    *(f"'a' {operator} m.content" for operator in ("<", ">", "in", "not in", "~", "+", "==", "%")),
]
a_content = st.sampled_from(["", "a", "b", "A", "a b", " a", "<a>", "b\n", "1", "\u00e9", "ab" * 9])


def compiled(expression: str) -> tuple[ChatTemplate, CompiledTemplate]:
    text = (
        "{% for m in messages %}{{ m.content }}{{ '!' if (" + expression + ") }}<end>{% endfor %}"
    )
    template = ChatTemplate(TemplateText("test", text), {})
    return template, CompiledTemplate(template, learn_rules(template, ["<end>"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("expression", EXPRESSIONS)
@given(contents=st.lists(a_content, min_size=1, max_size=3))
@settings(deadline=None, max_examples=25)
def test_a_compiled_template_prints_what_jinja_prints(expression: str, contents: list[str]) -> None:
    template, fast = compiled_once(expression)
    messages = tuple({"role": "user", "content": content} for content in contents)
    conversation = Conversation(messages, None, (None,) * len(messages))
    rendered = fast.render(conversation)
    if rendered is not None:
        assert rendered.text == template.render_plain(conversation)


_COMPILED: dict[str, tuple[ChatTemplate, CompiledTemplate]] = {}


def compiled_once(expression: str) -> tuple[ChatTemplate, CompiledTemplate]:
    if expression not in _COMPILED:
        _COMPILED[expression] = compiled(expression)
    return _COMPILED[expression]
