"""What ends a turn under templates that somebody else wrote: it is learned, named or refused, and
never the opening of the next message."""

import json
from pathlib import Path
from typing import Any

import pytest
from built_chunks import builder_of, chunk_of, samples_of
from foreign_templates import FOREIGN
from known_templates import CHATML, FAMILIES
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows
from rendered_rows import LOOP, custom
from trained_tokenizers import tokenizer_json

from prep.conversations.conversation import Conversation
from prep.rendering.spans import Rendered
from prep.rendering.template import ChatTemplate, TemplateText, shipped_templates
from prep.rendering.traced_str import Traced
from prep.rendering.turns import SpanRules, learn_rules
from prep.store import chunk_builder
from shared.errors import ConfigError, DataError
from shared.shard_format import Kind

SPECIALS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
NO_END = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ROW = {
    "messages": [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ]
}


def trained_text(text: str, row: dict[str, Any], family: str = "byte-level", **options: Any) -> str:
    """Return what is trained of a row that is kept, decoded; its reject's detail in brackets
    otherwise."""
    from tokenizers import Tokenizer

    builder = builder_of(text, tokenizer_json(family), SPECIALS, backend="transformers", **options)
    result = builder.build(chunk_of([row]))
    for _, ids, trained in samples_of(result):
        chosen = [token for token, yes in zip(ids, trained, strict=True) if yes]
        return str(
            Tokenizer.from_str(tokenizer_json(family)).decode(chosen, skip_special_tokens=False)
        )
    return f"[{result.facts['rejects'][0][1]}] {result.facts['rejects'][0][2]}"


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_what_opens_the_next_message_is_never_trained(prompt: str) -> None:
    assert trained_text(NO_END + prompt, ROW) == "a1a2"


def test_a_generation_prompt_that_is_always_printed_is_no_terminator() -> None:
    assert trained_text(NO_END + "<|im_start|>assistant\n", ROW) == "a1a2"
    with_end = NO_END.replace("}}\n{%", "}}<|im_end|>\n{%") + "<|im_start|>assistant\n"
    assert trained_text(with_end, ROW) == "a1<|im_end|>a2<|im_end|>"


def test_a_terminator_that_is_printed_only_between_messages_is_one() -> None:
    text = (
        LOOP
        + "<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}{%"
        " endfor %}"
    )
    assert trained_text(text, ROW) == "a1<|im_end|>a2"


def test_a_terminator_that_is_another_at_the_end_is_found_in_both_places() -> None:
    end = "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>\n' }}"
    text = (
        "<|im_start|>system\nYou help.<|im_end|>\n"
        + LOOP
        + "<|im_start|>{{ m.role }}\n{{ m.content }}"
        + end
    )
    assert trained_text(text + "{% endfor %}", ROW) == "a1<|im_end|>a2<|endoftext|>"


def test_one_token_that_is_both_bos_and_eos_ends_turns() -> None:
    text = (
        "<|endoftext|>"
        + LOOP
        + "{{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    )
    assert trained_text(text, ROW) == "a1<|endoftext|>a2<|endoftext|>"


def test_named_terminators_end_turns_though_they_open_the_next() -> None:
    glm = (
        LOOP + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt"
        " %}<|assistant|>\n{% endif %}"
    )
    assert trained_text(glm, ROW) == "a1a2"
    assert trained_text(glm, ROW, terminators=("<|user|>",)) == "a1<|user|>a2"


@pytest.mark.parametrize(
    "extra",
    [
        "You said: {{ messages[loop.index0 - 1].content }}\n",
        "You said: {{ messages[loop.index0 - 1].content[:1] }}\n",
        "{{ messages[loop.index0 + 1].content }}\n",
    ],
)
@pytest.mark.parametrize("end", ["<|im_end|>", ""])
def test_an_answer_printed_outside_its_own_turn_is_unverifiable(extra: str, end: str) -> None:
    shown = "{% if m.role == 'user' and loop.index0 == 2 %}" + extra + "{% endif %}"
    text = (
        LOOP
        + "<|im_start|>{{ m.role }}\n"
        + shown
        + "{{ m.content }}"
        + end
        + "\n{% endfor %}"
        + PROMPT
    )
    assert trained_text(text, ROW).startswith("[unverifiable]")


def test_a_piece_of_an_answer_that_its_own_turn_lacks_is_unverifiable_elsewhere() -> None:
    printed = "{{ m.content[1:] if m.role == 'assistant' else m.content }}"
    shown = "{% if loop.index0 == 2 %}{{ messages[1].content[:1] }} {% endif %}"
    message = "<|im_start|>{{ m.role }}\n" + shown + printed + "<|im_end|>\n"
    text = LOOP + message + "{% endfor %}" + PROMPT
    row = {"messages": ROW["messages"][:3]}
    assert "outside its own turn" in trained_text(text, row)


def test_a_tool_message_may_repeat_the_name_of_the_call_it_answers() -> None:
    text = (
        LOOP + "{% if m.role == 'tool' %}<|im_start|>{{ messages[loop.index0 -"
        " 1].tool_calls[0].function.name }}{% else %}<|im_start|>{{ m.role }}{% endif %}\n{{"
        " m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}({{"
        " c.function.arguments | tojson }}){% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"n": "x"}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "a"},
    ]
    assert trained_text(text, {"messages": messages}) == 'add({"n": "x"})<|im_end|>a<|im_end|>'


@pytest.mark.parametrize(
    "family", ["byte-level, rstrip", "byte-level, lstrip", "sentencepiece, rstrip"]
)
def test_blanks_that_a_control_token_swallows_do_not_make_it_trained(family: str) -> None:
    text = LOOP + "<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "  \n a b \n"},
        ]
    }
    trained = trained_text(text, row, family)
    assert "<|assistant|>" not in trained
    assert trained.endswith("<|im_end|>")
    assert trained.replace(" ", "").replace("\n", "") == "ab<|im_end|>"


def test_a_generation_block_around_the_header_trains_no_header() -> None:
    block = (
        "{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n<|im_start|>{%"
        " endgeneration %}"
    )
    other = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    text = (
        LOOP
        + "{% if m.role == 'assistant' %}"
        + block
        + "{% else %}"
        + other
        + "{% endif %}{% endfor %}"
        + PROMPT
    )
    assert trained_text(text, ROW) == "a1<|im_end|>a2<|im_end|>"


@pytest.mark.parametrize("name", sorted(shipped_templates()))
def test_every_shipped_template_ends_turns_with_tokens_of_its_family(name: str) -> None:
    family = FAMILIES.get(name, CHATML)
    text = shipped_templates()[name].read_text().removesuffix("\n")
    template = ChatTemplate(
        TemplateText(name, text), {"bos_token": family.bos, "eos_token": family.eos}, "2026-01-31"
    )
    openers = {
        "<|im_start|>",
        "<start_of_turn>",
        "<|start_header_id|>",
        "[INST]",
        "[TOOL_RESULTS]",
    }
    closing = learn_rules(template, family.control).closing
    assert closing
    assert not closing & openers


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_every_foreign_template_ends_turns(name: str) -> None:
    foreign = FOREIGN[name]
    template = ChatTemplate(TemplateText(name, foreign.text), foreign.special_tokens)
    assert learn_rules(template, foreign.control).closing


# In a build


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def tables_of(tmp_path: Path, tokenizer: Path, text: str) -> dict[str, Any]:
    (tmp_path / "custom.jinja").write_text(text)
    rows = write_rows(tmp_path / "rows.jsonl", [chat("Hi", "Yo"), chat("Hello", "There")])
    return mixture_of([rows], tokenizer, template="custom.jinja")


def test_a_template_that_never_ends_a_turn_stops_the_build(tokenizer: Path, tmp_path: Path) -> None:
    tables = tables_of(tmp_path, tokenizer, NO_END)
    with pytest.raises(ConfigError, match="would not learn to stop"):
        build_set(tables, tmp_path / "out")
    shards = build_set({**tables, "mask": {"terminator": "none"}}, tmp_path / "out")
    assert not any((shard["kind"] == Kind.TERMINATOR).any() for shard in shards.shards)


def test_a_terminator_that_the_tokenizer_does_not_know_stops_the_build(
    tokenizer: Path, tmp_path: Path
) -> None:
    tables = tables_of(tmp_path, tokenizer, NO_END)
    tables["template"]["terminators"] = ["<|user|>"]
    with pytest.raises(ConfigError, match="no control token"):
        build_set(tables, tmp_path / "out")


def test_a_mask_that_the_audit_finds_otherwise_ends_the_build(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = chunk_builder.find_spans

    def shifted(text: Traced, conversation: Conversation, rules: SpanRules) -> Rendered:
        rendered = find(text, conversation, rules)
        spans = [
            s._replace(kind=Kind.USER) if s.kind == Kind.TERMINATOR else s for s in rendered.spans
        ]
        return Rendered(rendered.text, spans, rendered.messages)

    monkeypatch.setattr(chunk_builder, "find_spans", shifted)
    rows = [{**chat("Hi", "Yo"), "tools": [{"name": "f"}]}]
    text = "{{ tools | tojson if tools }}" + NO_END.replace("}}\n{%", "}}<|im_end|>\n{%") + PROMPT
    tables = tables_of(tmp_path, tokenizer, text)
    tables["sources"] = [{"path": str(write_rows(tmp_path / "tools.jsonl", rows))}]
    tables["rows"] = {"on_error": "skip"}
    with pytest.raises(DataError, match=r"two methods disagree .* at token .*<\|im_end\|>"):
        build_set(tables, tmp_path / "out")


def test_rows_drawn_by_hash_are_audited_and_counted(tokenizer: Path, tmp_path: Path) -> None:
    tables = tables_of(tmp_path, tokenizer, NO_END.replace("}}\n{%", "}}<|im_end|>\n{%") + PROMPT)
    rows = [chat(f"Is {number} even?", "Yes" if number % 2 == 0 else "No") for number in range(600)]
    tables["sources"] = [{"path": str(write_rows(tmp_path / "many.jsonl", rows))}]
    build_set(tables, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert 0 < manifest["sources"][0]["details"]["rows_audited"] < 30


def test_the_rules_of_a_template_without_control_tokens_end_no_turn() -> None:
    _, rules = custom(LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert rules.closing == frozenset()
