"""Shipped templates print the known formats byte for byte and train what the assistant must
write."""

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from known_templates import (
    CHATML,
    CHATS,
    FAMILIES,
    OLMO_DEFAULTS,
    ONE_CALL,
    PROMPTS,
    TOOL,
    TOOL_CHATS,
    TWO_CALLS,
    WITHOUT_ENDS,
    Row,
    specials_of,
    text_of,
)
from rendered_rows import (
    ODD_CONTENTS,
    as_transformers,
    conversation_of,
    spans_of,
    trained_characters,
    trained_text,
)
from repository import SHARED_DATA

from prep.config import TemplateConfig
from prep.conversations.conversation import Conversation, parse_conversation
from prep.rendering.template import ChatTemplate, load_template, shipped_templates
from prep.rendering.turns import SpanRules, learn_rules
from shared.errors import TemplateError
from shared.shard_format import Kind

DATA = SHARED_DATA


def ready(name: str) -> tuple[ChatTemplate, SpanRules]:
    family = FAMILIES.get(name, CHATML)
    template = ChatTemplate(
        load_template(TemplateConfig(name=name), Path(), None), specials_of(name)
    )
    return template, learn_rules(template, family.control)


READY = {name: ready(name) for name in shipped_templates()}


def check(name: str, conversation: Conversation, marked: str) -> None:
    """Compare with a text whose trained parts are in brackets."""
    rendered = spans_of(*READY[name], conversation)
    assert rendered.text == marked.replace("⟦", "").replace("⟧", "")
    mask, letter = [], "."
    for character in marked:
        if character in "⟦⟧":
            letter = "T" if character == "⟦" else "."
        else:
            mask.append(letter)
    assert trained_characters(rendered) == "".join(mask)
    assert as_transformers(text_of(name), conversation, specials_of(name)) == rendered.text


@pytest.mark.parametrize(("name", "row", "marked"), CHATS)
def test_a_chat_is_printed_as_its_format_says(
    name: str, row: list[tuple[str, str]], marked: str
) -> None:
    check(name, conversation_of(*row), marked)


@pytest.mark.parametrize(("name", "row", "marked"), TOOL_CHATS)
def test_tools_and_reasoning_are_printed_as_their_format_says(
    name: str, row: Row, marked: str
) -> None:
    check(name, parse_conversation(row, where="row"), marked)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_generation_prompt_is_the_format_s(name: str) -> None:
    assert READY[name][0].generation_prompt() == PROMPTS[name]


def test_every_shipped_template_is_written_out_here_or_beside() -> None:
    beside = {"tulu", "zephyr", "simple_chat", "chatml"}  # tests/prep/rendering/test_template.py
    assert {name for name, *_ in CHATS} | beside == set(shipped_templates())


def test_calls_and_tool_answers_have_kinds_of_their_own() -> None:
    rendered = spans_of(
        *READY["mistral"], parse_conversation({"messages": TWO_CALLS, "tools": [TOOL]}, where="row")
    )
    by_kind = {
        kind: [rendered.text[s.start : s.end] for s in rendered.spans if s.kind == kind]
        for kind in Kind
    }
    assert by_kind[Kind.TOOL] == ["1", "2"]
    assert "".join(by_kind[Kind.TOOL_CALL]).startswith(
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "é"}'
    )
    assert by_kind[Kind.TERMINATOR] == ["</s>", "</s>"]
    assert by_kind[Kind.USER] == ["Q"]


TRIMS = ("gemma", "llama3", "llama3.1", "mistral")
ENDS = {"gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "llama3.1": "<|eot_id|>",
"mistral": "</s>",
        "qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>", "chatml": "<|im_end|>"}  # fmt: skip
MIDDLES = {**ENDS, **dict.fromkeys(OLMO_DEFAULTS, "<|im_end|>"), **dict.fromkeys(WITHOUT_ENDS, "")}


@pytest.mark.parametrize("name", sorted(shipped_templates()))
@pytest.mark.parametrize("content", ODD_CONTENTS)
def test_any_content_is_trained_with_what_ends_it(name: str, content: str) -> None:
    text = ODD_CONTENTS[content]
    if "</think>" in text and name in (
        "qwen3",
        "tulu_thinker_r1_style",
        "olmo_thinker_remove_intermediate_thinking",
    ):
        pytest.skip("it changes reasoning: tested above")
    answer = text.strip() if name in TRIMS else text
    last = "<think>\n\n</think>\n\n" + answer.lstrip("\n") if name == "qwen3" else answer
    rendered = spans_of(
        *READY[name],
        conversation_of(("user", text), ("assistant", text), ("user", "x"), ("assistant", text)),
    )
    eos = specials_of(name)["eos_token"]
    assert trained_text(rendered) == answer + MIDDLES.get(name, eos) + last + ENDS.get(name, eos)
    questions = [rendered.text[s.start : s.end] for s in rendered.spans if s.kind == Kind.USER]
    assert "".join(questions) == (text if name == "mistral" else answer) + "x"


USER = {"role": "user", "content": "Q"}


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("gemma", [USER, USER], "take turns"),
        ("gemma", [USER, {"role": "tool", "content": "1"}], "take turns"),
        (
            "mistral",
            [USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
            "take turns",
        ),
        ("mistral", [USER, {"role": "developer", "content": "a"}], "no developer message"),
        ("mistral", [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}], "9 characters"),
        ("mistral", [*ONE_CALL[:3], {"role": "tool", "content": "1"}], "9 characters"),
        ("llama3.1", TWO_CALLS, "one tool call"),
    ],
)
def test_what_a_known_format_forbids_is_refused(
    name: str, messages: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(TemplateError, match=reason):
        READY[name][0].render(parse_conversation({"messages": messages}, where="row"))


def test_llama_refuses_tools_if_no_question_comes_first() -> None:
    row = {"messages": [{"role": "assistant", "content": "hi"}, USER], "tools": [TOOL]}
    with pytest.raises(TemplateError, match="no question"):
        READY["llama3.1"][0].render(parse_conversation(row, where="row"))


# Qwen3 against the tokenizer's own template

SOURCES = ["tau_bench_airline", "bfcl", "taskmaster4", "lf_glaive_toolcall_en_demo", "gsm8k"]


def real_rows(source: str, count: int) -> list[Conversation]:
    path = DATA / "conversations" / f"{source}.jsonl.gz"
    if not path.is_file():
        pytest.skip("the real conversations are not beside this checkout")
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        return [parse_conversation(json.loads(line), where=source) for line in islice(lines, count)]


@pytest.mark.parametrize("source", SOURCES)
def test_qwen3_is_the_tokenizer_s_own_template(source: str) -> None:
    config = DATA / "tokenizers" / "qwen3" / "tokenizer_config.json"
    original = (
        json.loads(config.read_text())["chat_template"]
        if config.is_file()
        else pytest.skip("no Qwen3 tokenizer")
    )
    for conversation in real_rows(source, 25):
        for prompt in (
            {},
            {"add_generation_prompt": True},
            {"add_generation_prompt": True, "enable_thinking": False},
        ):
            text = as_transformers(text_of("qwen3"), conversation, specials_of("qwen3"), **prompt)
            assert text == as_transformers(original, conversation, specials_of("qwen3"), **prompt)
