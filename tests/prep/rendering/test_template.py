"""Shipped templates and Qwen3's own print the text of transformers, and train what the definition
of the mask says."""

import json
from pathlib import Path

import pytest
from rendered_rows import (
    CHATML_TOKENS,
    LOOP,
    ODD_CONTENTS,
    SPECIALS,
    as_transformers,
    conversation_of,
    custom,
    spans_of,
    trained_text,
)
from repository import SHARED_DATA

from prep.config import TemplateConfig
from prep.conversations.conversation import Conversation, parse_conversation
from prep.rendering.coverage import unrendered_fields
from prep.rendering.template import ChatTemplate, TemplateText, load_template
from prep.rendering.traced_str import Traced
from prep.rendering.turns import SpanRules, learn_rules
from shared.errors import ConfigError, TemplateError
from shared.shard_format import Kind

QWEN3 = SHARED_DATA / "tokenizers" / "qwen3"

# Shipped templates


def shipped(name: str, *, add_bos: bool = False) -> ChatTemplate:
    return ChatTemplate(
        load_template(TemplateConfig(name=name, add_bos=add_bos), Path(), None), SPECIALS
    )


# all others: tests/prep/rendering/test_known_templates.py
VERBATIM = ("chatml", "olmo", "simple_chat", "tulu", "zephyr")
ROWS = [
    [("user", "Hi"), ("assistant", "Yo")],
    [("system", "S"), ("user", "Hi "), ("assistant", " Yo\n"), ("user", ""), ("assistant", "")],
    [("assistant", "first"), ("user", "Hi"), ("assistant", "a"), ("assistant", "b")],
    [
        ("user", "a"),
        ("user", "b"),
        ("assistant", "\U0001f642 e\u0301<|im_end|>\r\n"),
        ("user", "last"),
    ],
]


@pytest.mark.parametrize("name", VERBATIM)
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_shipped_template_renders_as_transformers(
    name: str, add_bos: bool, row: list[tuple[str, str]]
) -> None:
    text = load_template(TemplateConfig(name=name, add_bos=add_bos), Path(), None).text
    template, conversation = shipped(name, add_bos=add_bos), conversation_of(*row)
    expected = as_transformers(text, conversation, SPECIALS)
    assert template.render(conversation) == template.render_plain(conversation) == expected
    opened = as_transformers(text, conversation, SPECIALS, add_generation_prompt=True)
    assert template.render_plain(conversation, add_generation_prompt=True) == opened


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("tulu", "<|assistant|>\n"), ("zephyr", "<|assistant|>\n"),
    ("chatml", "<|im_start|>assistant\n"),
     ("olmo", "<|im_start|>assistant\n")],
)  # fmt: skip
def test_generation_prompt_is_what_the_template_prints_before_an_answer(
    name: str, prompt: str
) -> None:
    assert shipped(name).generation_prompt() == prompt


@pytest.mark.parametrize("name", VERBATIM)
@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_shipped_template_trains_contents_and_what_ends_them(
    name: str, row: list[tuple[str, str]]
) -> None:
    template = shipped(name)
    rendered = spans_of(template, learn_rules(template, CHATML_TOKENS), conversation_of(*row))
    trained = trained_text(rendered)
    middle = {"chatml": "<|im_end|>", "olmo": "<|im_end|>", "simple_chat": ""}.get(
        name, "<|endoftext|>"
    )
    last = {"chatml": "<|im_end|>"}.get(name, "<|endoftext|>")
    expected = [
        content + (last if index == len(row) - 1 else middle)
        for index, (role, content) in enumerate(row)
        if role == "assistant"
    ]
    assert trained == "".join(expected)


@pytest.mark.parametrize("name", VERBATIM)
@pytest.mark.parametrize("content", ODD_CONTENTS.values(), ids=ODD_CONTENTS)
def test_shipped_template_covers_any_content(name: str, content: str) -> None:
    template = shipped(name)
    conversation = conversation_of(
        ("user", content), ("assistant", content), ("user", "x"), ("assistant", content)
    )
    rendered = spans_of(template, learn_rules(template, CHATML_TOKENS), conversation)
    trained = trained_text(rendered)
    assert trained.count(content) >= 2
    assert len(trained) <= 2 * len(content) + 2 * len("<|endoftext|>")
    spans = [s for s in rendered.spans if s.kind == Kind.USER]
    assert "".join(rendered.text[s.start : s.end] for s in spans) == content + "x"


def test_olmo_prints_functions_and_function_calls_inside_the_answer() -> None:
    template = shipped("olmo")
    row = {
        "messages": [
            {"role": "system", "content": "S", "functions": "[f]"},
            {"role": "user", "content": "Q", "functions": "[g]"},
            {"role": "assistant", "content": None, "function_calls": "f()<|im_end|>"},
            {"role": "environment", "content": "1"},
            {"role": "assistant", "content": "A", "function_calls": None},
        ]
    }
    conversation = parse_conversation(row, where="row")
    rendered = spans_of(template, learn_rules(template, CHATML_TOKENS), conversation)
    assert rendered.text == as_transformers(
        load_template(TemplateConfig(name="olmo"), Path(), None).text, conversation, SPECIALS
    )
    texts = [(rendered.text[s.start : s.end], s.kind) for s in rendered.spans]
    assert texts == [
        ("S", Kind.SYSTEM), ("[f]", Kind.SYSTEM), ("Q", Kind.USER), ("[g]", Kind.USER),
        ("<function_calls>", Kind.TOOL_CALL), ("f()<|im_end|>", Kind.TOOL_CALL),
        ("</function_calls>", Kind.TOOL_CALL),
        ("<|im_end|>", Kind.TERMINATOR), ("1", Kind.TOOL), ("A", Kind.ASSISTANT),
        ("<|endoftext|>", Kind.TERMINATOR),
    ]  # fmt: skip


def test_an_unknown_template_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        load_template(TemplateConfig(name="tullu"), Path(), None)


def test_a_template_that_prints_the_date_needs_one() -> None:
    text = "{{ strftime_now('%d %b %Y') }}" + LOOP + "{{ m.content }}<end>{% endfor %}"
    with pytest.raises(TemplateError, match=r"template\.date"):
        custom(text)[0].render(conversation_of(("user", "x")))
    dated = ChatTemplate(TemplateText("dated", text), {}, "2024-07-26")
    assert dated.render(conversation_of(("user", "x"))) == "26 Jul 2024x<end>"


# Qwen3's own template


@pytest.fixture(scope="session")
def qwen3() -> tuple[ChatTemplate, SpanRules]:
    if not QWEN3.is_dir():
        pytest.skip("the Qwen3 tokenizer is not beside this checkout")
    text = json.loads((QWEN3 / "tokenizer_config.json").read_text())["chat_template"]
    template = ChatTemplate(TemplateText("tokenizer", text), {"eos_token": "<|im_end|>"})
    return template, learn_rules(template, CHATML_TOKENS)


def prefix_trained(template: ChatTemplate, conversation: Conversation) -> str:
    """The last turn by prefix renders: what follows the generation prompt, without the newline at
    the end."""
    before = Conversation(conversation.messages[:-1], conversation.tools, conversation.train[:-1])
    opened = template.render_plain(before, add_generation_prompt=True)
    whole = template.render_plain(conversation)
    assert whole.startswith(opened)
    return whole.removeprefix(opened).removesuffix("\n")


@pytest.mark.parametrize("content", ODD_CONTENTS.values(), ids=ODD_CONTENTS)
def test_qwen3_last_turn_is_that_of_prefix_renders(
    qwen3: tuple[ChatTemplate, SpanRules], content: str
) -> None:
    template, rules = qwen3
    conversation = conversation_of(("user", "Q"), ("assistant", content))
    rendered = spans_of(template, rules, conversation)
    trained = trained_text(rendered)
    assert trained == prefix_trained(template, conversation)


def test_qwen3_trains_reasoning_and_calls_and_no_tool_answers(
    qwen3: tuple[ChatTemplate, SpanRules],
) -> None:
    template, rules = qwen3
    calls = [{"name": "f", "arguments": {"a": "<|im_end|>"}}, {"name": "g", "arguments": "{}"}]
    row = {
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": calls},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "A"},
        ],
        "tools": [{"type": "function", "function": {"name": "f<|im_end|>"}}],
    }
    rendered = spans_of(template, rules, parse_conversation(row, where="row"))
    trained = trained_text(rendered)
    assert (
        trained == "<think>\nhm\n</think>\n\n"
        '<tool_call>\n{"name": "f", "arguments": {"a": "<|im_end|>"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>'
        "<think>\n\n</think>\n\nA<|im_end|>"
    )
    assert [rendered.text[s.start : s.end] for s in rendered.spans if s.kind == Kind.TOOL] == [
        "1",
        "2",
    ]
    assert isinstance(template.render(parse_conversation(row, where="row")), Traced)


def test_qwen3_reasoning_that_its_template_would_cut_is_unrendered(
    qwen3: tuple[ChatTemplate, SpanRules],
) -> None:
    template, rules = qwen3
    conversation = conversation_of(("user", "Q"), ("assistant", "say <think>a</think>b"))
    assert unrendered_fields(template.render(conversation), conversation, rules) == (
        1,
        "assistant.content",
    )
