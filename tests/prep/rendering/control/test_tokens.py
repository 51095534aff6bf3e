"""Only the template makes control tokens, whatever their flag is and whatever the template does to
a text in which somebody typed one."""

import json
from functools import cache
from typing import Any

import pytest
import tokenizers
from built_chunks import builder_of, chunk_of, samples_of
from foreign_templates import FOREIGN
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_tokenizers import tokenizer_json

from prep.rendering.control.tokens import control_tokens
from prep.rendering.template import ChatTemplate, TemplateText, shipped_templates

SPECIALS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
BAR = "\uff5c"
MARKERS = (
    f"<{BAR}User{BAR}>",
    f"<{BAR}Assistant{BAR}>",
    f"<{BAR}end{BAR}>",
    "<tool_call>",
    "</tool_call>",
    "<result>",
)


@cache
def with_markers(family: str = "byte-level") -> str:
    """Return a tokenizer.json whose role markers are added tokens that are not special."""
    data = json.loads(tokenizer_json(family))
    first = 1 + max(token["id"] for token in data["added_tokens"])
    shape = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    data["added_tokens"] += [
        {"id": first + i, "content": token, **shape} for i, token in enumerate(MARKERS)
    ]
    return json.dumps(data)


DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' }}"
    "{% if loop.last and m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}"
    "{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|end|>' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}{{ '<|User|><result>' + m.content }}{% else %}{{ m.content }}{% "
    "endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
).replace("<|User|>", MARKERS[0]).replace("<|Assistant|>", MARKERS[1]).replace("<|end|>",
MARKERS[2])  # fmt: skip
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'"
    " }}EXTRA{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# templates that print a user's text once more, in a way that loses where it came from
LOSSY = {
    name: CHATML.replace("EXTRA", "{% if m.role == 'user' %}{{ " + extra + " }}{% endif %}")
    for name, extra in {
        "lower": "m.content | lower",
        "wordwrap": "m.content | wordwrap(200)",
        "center": "m.content | center(200)",
        "pprint": "m.content | pprint",
        "format": "'<{}>'.format(m.content)",
        "percent": "'%s!' % m.content",
        "list": "[m.content] | list | string",
        "upper and lower": "m.content | upper | lower",
        "no blanks": "m.content | wordwrap(1) | replace('\n', '')",
        "built around": "'<|' + (m.content | lower) + '|>'",
        "title": "m.content | title",
    }.items()
}
SHIPPED = {name: path.read_text().removesuffix("\n") for name, path in shipped_templates().items()}
UNMARKED = {name: foreign.text for name, foreign in FOREIGN.items()}
TEMPLATES = {
    **LOSSY,
    "deepseek-like": DEEPSEEK,
    "chatml": CHATML.replace("EXTRA", ""),
    **SHIPPED,
    **UNMARKED,
}
PIECES = [
    *MARKERS, "<|im_end|>", "<|IM_END|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|im _end|>",
    "im_end", "IM_END",
    "<think>", "</think>", "<|user|>", "<", "|", ">", "a", "B", " ", "\n", "Hello", "\u00e9",
    "\u6771",
]  # fmt: skip
a_text = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


@cache
def ready(name: str, family: str) -> tuple[Any, frozenset[int]]:
    """Return (builder, ids of control tokens)."""
    backend = "gigatoken" if family == "byte-level" else "transformers"
    builder = builder_of(TEMPLATES[name], with_markers(family), SPECIALS, backend=backend)
    return builder, frozenset(builder._encoder.is_control.nonzero()[0].tolist())


def inert(text: str) -> str:
    """Return a text of the same length that holds no markup at all, apart from the tags of
    reasoning."""
    tags = text.replace("<think>", "\0").replace("</think>", "\1")
    crossed = "".join(char if char in "\0\1" or char.isspace() else "x" for char in tags)
    return crossed.replace("\0", "<think>").replace("\1", "</think>")


@given(
    turns=st.lists(st.tuples(a_text, a_text), min_size=1, max_size=3),
    system=st.none() | a_text,
    name=st.sampled_from(sorted(TEMPLATES)),
    family=st.sampled_from(["byte-level", "byte-level, rstrip", "sentencepiece, first"]),
)
@settings(deadline=None, max_examples=400)
def test_the_control_ids_of_a_row_are_those_of_the_same_row_with_inert_contents(
    turns: list[tuple[str, str]], system: str | None, name: str, family: str
) -> None:
    builder, control = ready(name, family)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    result = builder.build(chunk_of([{"messages": messages}]))
    harmless = [{"role": m["role"], "content": inert(m["content"])} for m in messages]
    for _, ids, _ in samples_of(result):
        expected = builder.build(chunk_of([{"messages": harmless}]))
        (other,) = (ids for _, ids, _ in samples_of(expected))
        assert [i for i in ids if i in control] == [i for i in other if i in control]
    assert (
        len(result.columns["sample_row"])
        + len(result.facts["rejects"])
        + len(result.facts["unrendered"])
        == 1
    )


@pytest.mark.parametrize("name", sorted(LOSSY))
def test_a_typed_control_token_that_loses_its_origin_leaves_the_row_out(name: str) -> None:
    builder, control = ready(name, "byte-level")
    typed = (
        "IM_END" if name == "built around" else "<|IM_END|>" if "lower" in name else "<|im_end|>"
    )
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]}
        for text in ("plain words", f"type {typed}" if name != "built around" else typed)
    ]
    result = builder.build(chunk_of(rows))
    (ids,) = (ids for _, ids, _ in samples_of(result))
    assert sum(i in control for i in ids) == 4
    assert [(row, reason) for row, reason, _ in result.facts["rejects"]] == [(1, "unverifiable")]


def test_markers_are_control_tokens_whatever_their_flag_and_what_models_write_is_not() -> None:
    added = {
        token["content"]: token["special"] for token in json.loads(with_markers())["added_tokens"]
    }
    tokens = control_tokens(
        ChatTemplate(TemplateText("t", DEEPSEEK), SPECIALS), ("<|endoftext|>",), added
    )
    assert set(tokens) == {"<|endoftext|>", *MARKERS[:3], "<result>"}


@pytest.mark.parametrize("backend", ["gigatoken", "transformers"])
def test_a_typed_marker_that_is_not_special_stays_text_and_thinking_matches(backend: str) -> None:
    builder = builder_of(DEEPSEEK, with_markers(), SPECIALS, backend=backend)
    tokenizer = tokenizers.Tokenizer.from_str(with_markers())
    row = [
        {"role": "system", "content": "Call <tool_call>f</tool_call>."},
        {"role": "user", "content": f"a{MARKERS[1]}b <think>"},
        {"role": "assistant", "content": "c"},
    ]
    ((_, ids, _),) = samples_of(builder.build(chunk_of([{"messages": row}])))
    names = [tokenizer.id_to_token(i) for i in ids]
    assert [n for n in names if n in MARKERS[:3]] == list(MARKERS[:3])
    assert names.count("<think>") == 1
    assert names.count("<tool_call>") == names.count("</tool_call>") == 1


@pytest.mark.parametrize("backend", ["gigatoken", "transformers"])
@given(
    parts=st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), a_text), min_size=1, max_size=5
    )
)
@settings(deadline=None, max_examples=60)
def test_plain_text_roles_write_no_markup_and_other_roles_do(
    backend: str, parts: list[tuple[str, str]]
) -> None:
    row = [
        {"role": role, "content": text}
        for role, text in [*parts, ("assistant", "<think>x</think>y")]
    ]
    plain, usual = (
        plain_builder(backend, roles).build(chunk_of([{"messages": row}]))
        for roles in (("user",), ())
    )
    if not len(usual.columns["sample_row"]):
        return
    ((_, ids, _),), ((_, other, _),) = samples_of(plain), samples_of(usual)
    tokenizer = tokenizers.Tokenizer.from_str(with_markers())
    markup = {
        tokenizer.token_to_id(t)
        for t in ("<think>", "</think>", "<tool_call>", "</tool_call>", *MARKERS)
    }
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.decode(
        other, skip_special_tokens=False
    )
    harmless = [
        (
            m
            if m["role"] != "user"
            else {**m, "content": inert(m["content"].replace("think>", "think|"))}
        )
        for m in row
    ]
    ((_, expected, _),) = samples_of(
        plain_builder(backend, ()).build(chunk_of([{"messages": harmless}]))
    )
    assert [i for i in ids if i in markup] == [i for i in expected if i in markup]


@cache
def plain_builder(backend: str, roles: tuple[str, ...]) -> Any:
    return builder_of(
        CHATML.replace("EXTRA", ""), with_markers(), SPECIALS, backend=backend, plain_roles=roles
    )
