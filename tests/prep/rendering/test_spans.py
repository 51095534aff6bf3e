"""The spans of foreign templates without generation blocks are those of an account written by hand;
what cannot be proved is refused."""

import pytest
from foreign_templates import FOREIGN, Foreign
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered_rows import LOOP, ODD_CONTENTS, conversation_of, custom, spans_of, trained_characters

from prep.conversations.conversation import Conversation
from prep.rendering.template import ChatTemplate, TemplateText
from prep.rendering.turns import SpanRules, learn_rules
from shared.errors import TemplateError


def ready(foreign: Foreign) -> tuple[ChatTemplate, SpanRules]:
    template = ChatTemplate(TemplateText("foreign", foreign.text), foreign.special_tokens)
    return template, learn_rules(template, foreign.control)


READY = {name: ready(foreign) for name, foreign in FOREIGN.items()}


def check_against_account(name: str, conversation: Conversation) -> None:
    template, rules = READY[name]
    rendered = spans_of(template, rules, conversation)
    account = list(FOREIGN[name].account(list(conversation.messages)))
    assert rendered.text == "".join(text for text, _ in account)
    assert trained_characters(rendered) == "".join(
        ("T" if trained else ".") * len(text) for text, trained in account
    )


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("content", ODD_CONTENTS, ids=ODD_CONTENTS)
def test_foreign_template_trains_what_its_account_says(name: str, content: str) -> None:
    if name == "deepseek" and "thinking" in content:
        pytest.skip("it forgets the thinking of earlier turns: tested below")
    text = ODD_CONTENTS[content]
    check_against_account(
        name,
        conversation_of(
            ("user", text), ("assistant", text), ("user", "Q"), ("assistant", text + "!")
        ),
    )


@pytest.mark.parametrize("name", sorted(set(FOREIGN) - {"gemma"}))
def test_foreign_template_with_a_system_prompt(name: str) -> None:
    check_against_account(
        name,
        conversation_of(
            ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
        ),
    )


@pytest.mark.parametrize("name", sorted(set(FOREIGN) - {"gemma", "mistral"}))
def test_foreign_template_with_an_assistant_first_and_two_in_a_row(name: str) -> None:
    check_against_account(
        name,
        conversation_of(
            ("assistant", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e")
        ),
    )


PIECES = [
    "<|im_end|>",
    "</s>",
    "<|assistant|>\n",
    "<Assistant>",
    "<|im_start|>assistant\n",
    "a",
    " ",
    "\n",
    "\u00e9",
]
some_contents = st.lists(
    st.lists(st.sampled_from(PIECES), max_size=4).map("".join), min_size=1, max_size=6
)


@pytest.mark.parametrize("name", FOREIGN)
@given(contents=some_contents)
@settings(deadline=None, max_examples=60)
def test_foreign_template_trains_what_its_account_says_for_any_contents(
    name: str, contents: list[str]
) -> None:
    check_against_account(
        name, conversation_of(*zip(["user", "assistant"] * 3, contents, strict=False))
    )


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("mistral", [("user", "a"), ("user", "b")], "must alternate"),
        (
            "gemma",
            [("system", "a"), ("user", "b"), ("assistant", "c")],
            "System role not supported",
        ),
        ("mistral", [("user", "a"), ("tool", "b")], "Only user and assistant"),
    ],
)
def test_a_refusal_quotes_the_template(name: str, row: list[tuple[str, str]], reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        READY[name][0].render(conversation_of(*row))


def test_texts_of_two_messages_in_one_place_are_unverifiable() -> None:
    template, rules = custom("{{ messages | tojson }}<end>")
    with pytest.raises(TemplateError, match="two messages"):
        spans_of(template, rules, conversation_of(("user", "x"), ("assistant", "y")))


def test_an_answer_printed_again_around_another_message_is_unverifiable() -> None:
    template, rules = custom(
        "{{ messages[1].content }}" + LOOP + "<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    )
    with pytest.raises(TemplateError, match="outside its own turn"):
        spans_of(template, rules, conversation_of(("user", "x"), ("assistant", "y")))


def test_a_generation_block_around_the_question_is_unverifiable() -> None:
    template, rules = custom(
        "{% generation %}" + LOOP + "{{ m.content }}<end>{% endfor %}{% endgeneration %}"
    )
    with pytest.raises(TemplateError, match="two messages"):
        spans_of(template, rules, conversation_of(("user", "x"), ("assistant", "y"), ("user", "z")))
