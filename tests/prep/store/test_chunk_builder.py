"""Rows of every format, mutated at random: each becomes a sample, a reject or an unrendered row.
None ends in a traceback.

The mutations are those that once found a bug, and more: nesting, odd numbers, duplicate keys, wrong
types, bytes.
"""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from built_chunks import builder_of
from raw_chunks import builder, chunk_of
from trained_tokenizers import tokenizer_json

from prep.conversations.json_text import MAX_DEPTH
from prep.sources.chunk import Chunk, parse_chunk
from shared.errors import DataError

CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 1, "b": [2, {"c": "x"}]}},
}
TOOL = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer", "default": None}},
    "required": ["a"]}}}  # fmt: skip
SEEDS: dict[Any, dict[str, Any]] = {
    "messages": {"tools": [TOOL], "messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "assistant", "content": "3", "train": True},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": "x: \\ \""},
    ]},
    "sharegpt": {"system": "S", "tools": json.dumps([TOOL]), "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "It is 3"},
    ]},
    "alpaca": {"instruction": "Add", "input": "1 2", "output": "3", "system": "S",
    "history": [["a", "b"]]},
    "prompt_completion": {"prompt": [{"role": "user", "content": "Q"}], "completion": "A",
    "tools": [TOOL]},
}  # fmt: skip
TEMPLATES = ("chatml", "llama3.1", "mistral", "olmo", "qwen2.5", "qwen3", "tulu", "tulu_thinker")


class Raw(str):
    """JSON text that is put into a row unchanged."""


def nested(depth: int, kind: str) -> Any:
    opening, closing = ('{"a":', "}") if kind == "object" else ("[", "]")
    return Raw(opening * depth + "1" + closing * depth)


ODD: list[Any] = [
    None, True, 0, -1, "", [], {}, [[]], [None], {"": None}, {"": {"": [""]}}, [{}], "x" * 5000,
    "\x00", "\ufeff", "\u2028", "<|im_end|>", "<|endoftext|> <|user|>", "{", "[1",
    '{"a": 1, "a": 2}', "null", "[]", '"x"',
    Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"), Raw("-0"), Raw("-0.0"), Raw("1E-400"),
    Raw("9" * 19), Raw("1" + "0" * 400), Raw("9" * 5000), Raw("-" + "9" * 30), Raw("0.1e1"),
    Raw('"\\ud800"'), Raw('"\\udc00\\ud800"'), Raw('"\\u0000"'),
    Raw('{"a": 1, "a" : 2}'), Raw('{"\\u0061":1,"a":2}'),
    Raw('{"a\\\\":1,"b":1,"b":2}'), Raw("}"),
    Raw('"\x01"'), Raw(""), {"k" * 3000: {"v": ["w", "w"]}},
    {"keys": 1, "items": "x", "get": [], "__class__": "y"},
    *(nested(depth, kind) for depth in (30, 60, 61, 70, 250, 1100, 20_000)
      for kind in ("object", "list")),
    Raw('"' + '{\\"a\\":' * 500 + "1" + "}" * 500 + '"'), Raw('"' + "[" * 300 + "]" * 300 + '"'),
]  # fmt: skip
KEYS = [
    "role", "content", "train", "weight", "name", "tool_calls", "function", "arguments", "tools",
    "value", "from", "type", "text", "reasoning_content", "function_calls", "functions", "history",
    "id", "messages",
]  # fmt: skip


def dumps(value: Any) -> str:
    """JSON in which Raw stands as it is."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{json.dumps(key)}: {dumps(item)}" for key, item in value.items())
            + "}"
        )
    return (
        "[" + ",".join(map(dumps, value)) + "]"
        if isinstance(value, list)
        else json.dumps(value, ensure_ascii=False)
    )


def mutated(value: Any, draw: random.Random) -> Any:
    """Return `value` with one change somewhere within it."""
    inner = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if type(value) is list
        else []
    )
    if not inner or draw.random() < 0.08:
        return draw.choice(ODD)
    key, item = draw.choice(inner)
    action = draw.random()
    if isinstance(value, dict):
        if action < 0.1:
            return {name: other for name, other in value.items() if name != key}
        if action < 0.25:
            return {**value, draw.choice(KEYS): draw.choice(ODD)}
        return {**value, key: mutated(item, draw)}
    if action < 0.1:
        return [other for index, other in inner if index != key]
    if action < 0.2:
        return [*value, draw.choice(value)]
    return [mutated(other, draw) if index == key else other for index, other in inner]


def mutated_line(row: dict[str, Any], draw: random.Random) -> bytes:
    """Return a line with one to three changes to the row and, at times, one to its bytes."""
    value: Any = row
    for _ in range(draw.randint(1, 3)):
        value = mutated(value, draw)
    line = dumps(value).encode("utf-8", "surrogatepass").replace(b"\n", b" ")
    if draw.random() < 0.15:
        at = draw.randrange(len(line) + 1)
        odd = draw.choice([b"\xff", b"\x00", b"", b"\xed\xa0\x80", b'"', b"{", b"\xef\xbb\xbf"])
        line = line[:at] + odd + line[at + 1 :]
    return line.replace(b"\n", b" ") or b"0"


def check_accounts(chunk: Chunk, made: Any) -> None:
    facts = made.facts
    rows = [row for row, *_ in [*facts["rejects"], *facts["unrendered"]]] + made.columns[
        "sample_row"
    ].tolist()
    assert sorted(rows) == list(range(chunk.num_rows))
    assert facts["rows"] == chunk.num_rows
    assert all(f"(row {row})" in detail for row, _, detail in facts["rejects"])
    json.dumps(facts)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", SEEDS)
def test_a_mutated_row_is_a_sample_a_reject_or_unrendered(name: str, template: str) -> None:
    draw = random.Random(f"{name} {template}")
    lines = [mutated_line(SEEDS[name], draw) for _ in range(60)] + [dumps(SEEDS[name]).encode()]
    chunk = chunk_of(lines, name)
    check_accounts(chunk, builder(template, drop_messages=draw.random() < 0.5).build(chunk))


_QUESTION = '{"role":"user","content":"a"}'
_CALL = '{"name":"f","arguments":{"x":%s}}'
_CHAT = f'[{_QUESTION},{{"role":"assistant","content":"b"}}]'
FIELDS = {
    "arguments": f'{{"messages":[{_QUESTION},{{"role":"assistant","tool_calls":[{_CALL}]}}]}}',
    "tools": f'{{"tools":[{{"name":"f","parameters":%s}}],"messages":{_CHAT}}}',
    "other": '{"messages":[{"role":"user","content":"a","mood":%s},'
             '{"role":"assistant","content":"b"}],"id":1}',
    "column": f'{{"messages":{_CHAT},"meta":%s}}',
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 250, 100_000])
def test_too_deep_a_row_is_malformed_and_says_where(field: str, depth: int) -> None:
    line = (FIELDS[field] % nested(depth, "object")).encode()
    made = builder("qwen3").build(chunk_of([line, (FIELDS[field] % "[[1]]").encode()]))
    ((row, reason, detail),) = made.facts["rejects"]
    assert (row, reason) == (0, "malformed")
    assert "nested more than 64 levels deep" in detail
    assert depth > 1000 or field.replace("other", "mood").replace("column", "meta") in detail


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_deepest_row_that_is_read_is_rendered_and_hashed(template: str) -> None:
    lines = [(FIELDS[field] % nested(MAX_DEPTH - 8, "object")).encode() for field in FIELDS]
    made = builder(template).build(chunk_of(lines))
    assert not made.facts["rejects"]


@pytest.mark.parametrize(
    "line",
    [
        '{"messages":[{"role":"user","content":"a","content":"b"}]}',
        '{"messages":[],"messages":[{"role":"user","content":"a"}]}',
        '{"messages":[{"role":"user" ,"content" : "a","content"\t:"b"}]}',
        '{"messages":[{"role":"user","content":"a","\\u0063ontent":"b"}]}',
        '{"messages":[{"role":"user","content":"a","x":{"content\\\\":1,"content\\\\":2}}]}',
        (
            '{"messages":[{"role":"user","content":": a \\": b'
            ' :","x":[{"a":1},{"content":1,"content":1}]}]}'
        ),
    ],
)
def test_a_duplicate_key_is_refused_and_named(line: str) -> None:
    ((_, _, record),) = parse_chunk(chunk_of([line.encode()]))
    assert isinstance(record, DataError)
    assert "occurs twice in one object" in str(record)
    assert "messages" in str(record) or "content" in str(record)


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_an_odd_value_anywhere_in_a_message_is_no_traceback(odd: Any) -> None:
    call = {"id": odd, "type": odd, "function": {"name": "f", "arguments": odd, "x": odd}}
    messages: list[Any] = [{key: odd, "role": "user"} for key in KEYS]
    messages += [{"role": "assistant", "content": "", key: odd} for key in KEYS]
    messages += [{"role": "user", "content": [{"type": "text", key: odd}]} for key in KEYS]
    messages += [
        {"role": "assistant", "content": "x", "tool_calls": [one]}
        for one in (call, odd, {"function": odd})
    ]
    rows: list[Any] = [odd, {"messages": odd}, {"messages": [odd]}]
    rows += [{"messages": [{"role": "user", "content": "a"}, message], "tools": tools}
             for message in messages for tools in ([], odd, [odd])]  # fmt: skip
    lines = [dumps(row).encode() or b"0" for row in rows]
    chunk = chunk_of(lines)
    check_accounts(chunk, builder("qwen3").build(chunk))


def test_an_unverifiable_row_is_listed_and_costs_no_other_row() -> None:
    template = (
        "{% for m in messages %}{{ '<|user|>' + m.content + '<|im_end|>' }}"
        "{% if m.content == 'twice' %}{{ messages | tojson }}{% endif %}{% endfor %}"
    )
    specials = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    chunks = builder_of(template, tokenizer_json("byte-level"), specials)
    contents = ["a", "twice", "b", "<|im_end|>", "c", "twice"]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "d"}]}
        for text in contents
    ]
    lines = [json.dumps(row).encode() for row in rows]
    made = chunks.build(replace(chunk_of(lines), first_row=100))
    assert made.columns["sample_row"].tolist() == [100, 102, 103, 104]
    rejects = [event[:2] for event in made.facts["rejects"]]
    assert rejects == [(101, "unverifiable"), (105, "unverifiable")]


def test_what_only_looks_like_a_key_is_none() -> None:
    draw = random.Random(0)
    pieces = ['"', "\\", ":", " ", "a", "{", "}", ",", "\t", '":', '\\":', "null", "\n"]
    for _ in range(3000):
        texts = ["".join(draw.choices(pieces, k=draw.randint(0, 6))) for _ in range(4)]
        row = {"messages": [{"role": "user", texts[0] + "k": texts[1]}], texts[2]: {texts[3]: 1}}
        line = json.dumps(row, separators=draw.choice([(",", ":"), (", ", ": "), (" , ", " : ")]))
        ((_, _, record),) = parse_chunk(chunk_of([line.encode()]))
        assert record == row


def test_arguments_that_are_no_json_object_are_counted() -> None:
    texts = ['{"a": 1}', "a = 1", "[1]", "", "{", '{"a": NaN}']
    calls = [{"name": "f", "arguments": text} for text in texts]
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
    }
    made = builder("qwen3").build(
        chunk_of([json.dumps(row).encode(), dumps(SEEDS["messages"]).encode()])
    )
    assert made.facts["samples"] == 2
    assert made.facts["calls_not_json"] == 5
