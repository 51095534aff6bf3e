"""Formats of rows: detected once per source, converted without a change of text, refused by row and
field."""

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_builds import REAL_DATA, build_set, chat, mixture_of, small_tokenizer, write_rows

from prep.config import MixtureConfig
from prep.conversations.formats import PLAIN_MESSAGES, Conversion, detect, read_conversation
from prep.inspection.stats import stats, stats_lines
from shared import config
from shared.errors import ConfigError, DataError

SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
ALPACA = {"instruction": "Add", "input": "2 3", "output": "5"}
PAIR = {"prompt": "2 + 3?", "completion": "5"}
CHAT = chat("a", "b")
CALL = '{"name": "add", "arguments": {"a": 2}}'


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def turns(record: dict[str, Any], name: Any) -> list[tuple[Any, ...]]:
    """Return (role, content) of every message of a record of format `name`."""
    messages = read_conversation(record, Conversion(name), where="here").messages
    return [(message["role"], message["content"]) for message in messages]


@pytest.mark.parametrize(
    ("records", "columns", "expected"),
    [
        ([CHAT], {}, "messages"),
        ([{"conversations": CHAT["messages"]}], {}, "messages (messages = 'conversations')"),
        ([SHAREGPT], {}, "sharegpt"),
        ([{"messages": SHAREGPT["conversations"]}], {}, "sharegpt (conversations = 'messages')"),
        ([ALPACA], {}, "alpaca"),
        ([PAIR], {}, "prompt_completion"),
        # as in ultrachat, whose prompt repeats the first message
        ([{**PAIR, **CHAT}], {}, "messages"),
        ([{"q": "?", "a": "!"}], {"prompt": "q", "completion": "a"}, "prompt_completion"),
        ([{"instruction": "i", "r": "!", "c": "?"}], {"output": "r", "input": "c"}, "alpaca"),
        ([{"dialog": [{"from": "user"}]}], {"messages": "dialog", "role": "from"}, "messages"),
        # the first that fits
        ([{"id": 1}, "no object", {"messages": []}, ALPACA, PAIR], {}, "alpaca"),
        ([{"id": 1}] * 64 + [ALPACA], {}, "None"),
    ],
)
def test_the_first_row_that_fits_a_format_decides(
    records: list[Any], columns: dict[str, str], expected: str
) -> None:
    assert str(detect(records, columns)).startswith(expected)


def test_a_sharegpt_row_keeps_its_texts_and_their_roles() -> None:
    record = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": " Hi "},
            {"from": "function_call", "value": CALL},
            {"from": "observation", "value": "5"},
            {"from": "gpt", "value": "Five.", "weight": 0},
        ],
        "tools": (
            '[{"name": "add", "parameters": {}}, {"type": "function", "function": {"name": "sub"}}]'
        ),
    }
    conversation = read_conversation(record, Conversion("sharegpt"), where="here")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    assert list(conversation.messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "Five."},
    ]
    assert conversation.train == (None, None, None, None, False)
    assert conversation.tools == [
        {"type": "function", "function": {"name": "add", "parameters": {}}},
        {"type": "function", "function": {"name": "sub"}},
    ]


def test_several_calls_of_one_turn_stay_one_message() -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": f"[{CALL}, {CALL}]"},
        ]
    }
    message = read_conversation(record, Conversion("sharegpt"), where="here").messages[1]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["add", "add"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (ALPACA, [("user", "Add\n2 3"), ("assistant", "5")]),
        ({"instruction": "Add", "output": "5"}, [("user", "Add"), ("assistant", "5")]),
        (
            {**ALPACA, "input": None, "system": None, "history": None},
            [("user", "Add"), ("assistant", "5")],
        ),
        (
            {**ALPACA, "input": "", "system": "S", "history": [["a", "b"]]},
            [
                ("system", "S"),
                ("user", "a"),
                ("assistant", "b"),
                ("user", "Add"),
                ("assistant", "5"),
            ],
        ),
    ],
)
def test_an_input_follows_its_instruction_on_a_new_line(
    record: dict[str, Any], expected: Any
) -> None:
    assert turns(record, "alpaca") == expected


def test_an_assistants_message_in_a_prompt_is_trained_only_if_the_row_asks_for_it() -> None:
    prompt = [
        *chat("a", "b", "c")["messages"],
        {"role": "assistant", "content": "d", "train": True},
    ]
    record = {
        "prompt": prompt,
        "completion": [{"role": "assistant", "content": "e"}],
        "system": "S",
    }
    conversation = read_conversation(record, Conversion("prompt_completion"), where="here")
    assert [m["content"] for m in conversation.messages] == ["S", "a", "b", "c", "d", "e"]
    assert conversation.train == (None, None, False, None, True, None)
    assert turns(PAIR, "prompt_completion") == [("user", "2 + 3?"), ("assistant", "5")]


def test_columns_rename_fields_and_the_keys_of_messages() -> None:
    record = {
        "dialog": [
            {"speaker": "user", "text": "a", "role": "x"},
            {"speaker": "assistant", "text": "b", "weight": 1},
        ]
    }
    columns = (("content", "text"), ("messages", "dialog"), ("role", "speaker"))
    conversation = read_conversation(record, Conversion("messages", columns), where="here")
    assert list(conversation.messages) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert conversation.train == (None, True)


def test_columns_of_other_formats_in_a_row_of_messages_are_ignored() -> None:
    record = {
        **chat("a", "b"),
        "tools": [{"name": "add"}],
        "instruction": "ignored",
        "output": "ignored",
    }
    conversation = read_conversation(record, PLAIN_MESSAGES, where="here")
    assert conversation.tools == [{"name": "add"}]
    assert [m["content"] for m in conversation.messages] == ["a", "b"]


def sharegpt(*turns: Any) -> dict[str, Any]:
    return {"conversations": list(turns)}


def completion(*messages: Any) -> dict[str, Any]:
    return {"prompt": "x", "completion": list(messages)}


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("sharegpt", CHAT, "here: no conversations; the row has messages; expected a list of"),
        ("sharegpt", {**SHAREGPT, "tools": "[{"}, "tools is text but not JSON"),
        ("sharegpt", {**SHAREGPT, "system": 1}, "system is 1; expected a string"),
        ("sharegpt", sharegpt(), "conversations is []; expected a list of messages"),
        ("sharegpt", sharegpt("hi"), "[0] is 'hi'; expected an object with from and value"),
        ("sharegpt", sharegpt({"from": "bot", "value": "x"}), "[0].from is 'bot'; expected"),
        ("sharegpt", sharegpt({"from": "gpt"}), "[0].value is missing; expected a string"),
        ("sharegpt", sharegpt({"from": "gpt", "value": 5}), "conversations[0].value is 5"),
        ("sharegpt", sharegpt({"from": "function_call", "value": "add(2)"}), "is text but not"),
        ("sharegpt", sharegpt({"from": "function_call", "value": "{}"}), 'expected {"name"'),
        (
            "sharegpt",
            sharegpt({"from": "human", "value": "x"}, {"from": "system", "value": "x"}),
            "conversations[1].from is 'system'; expected it at most once, before all others",
        ),
        ("alpaca", {"instruction": "x"}, "no output; the row has instruction; expected a string"),
        ("alpaca", {**ALPACA, "output": ["a", "b"]}, "output is ['a', 'b']; expected a string"),
        ("alpaca", {**ALPACA, "history": [["a"]]}, "history[0] is ['a']; expected [what the user"),
        ("alpaca", {**ALPACA, "history": "a"}, "history is 'a'; expected a list of pairs"),
        ("prompt_completion", {"prompt": "x"}, "no completion; the row has prompt; expected a"),
        ("prompt_completion", completion("y"), "completion[0] is 'y'; expected an object"),
        (
            "prompt_completion",
            completion({"role": "bot", "content": "y"}),
            "messages[1].role is 'bot'; expected system, developer",
        ),
    ],
)
def test_a_row_of_another_shape_is_refused_with_the_name_of_its_field(
    name: Any, record: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError) as raised:
        read_conversation(record, Conversion(name), where="here")
    assert str(raised.value).startswith("here")
    assert expected in str(raised.value)


ROLES = {"user": "human", "assistant": "gpt", "tool": "observation"}
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(sorted(ROLES)), "content": st.text(max_size=8)}
)


@settings(max_examples=50, deadline=None)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=6))
def test_a_conversation_reads_the_same_in_each_format_that_can_hold_it(
    messages: list[dict[str, str]],
) -> None:
    plain = read_conversation({"messages": messages}, PLAIN_MESSAGES, where="here")
    sharegpt = {
        "conversations": [{"from": ROLES[m["role"]], "value": m["content"]} for m in messages]
    }
    assert read_conversation(sharegpt, Conversion("sharegpt"), where="here") == plain
    pair = {"prompt": [{"role": "user", "content": "q"}], "completion": messages}
    assert (
        read_conversation(pair, Conversion("prompt_completion"), where="here").messages[1:]
        == plain.messages
    )


def test_a_source_has_one_format_and_another_row_is_named_by_line_row_and_field(
    tmp_path: Path, tokenizer: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [SHAREGPT, "", chat("a", "b")])
    with pytest.raises(
        DataError,
        match=r"rows.jsonl line 3 \(row 1\): no conversations; .* is sharegpt \(malformed\)",
    ):
        build_set(mixture_of([path], tokenizer), tmp_path / "out")


def test_formats_are_stated_in_the_manifest_and_in_stats(tmp_path: Path, tokenizer: Path) -> None:
    odd = [{"question": "q?", "answer": "a."}]
    sources = [
        {"path": str(write_rows(tmp_path / f"{name}.jsonl", rows)), **more}
        for name, rows, more in (
            ("plain", [chat("a", "b")], {}),
            ("shared", [SHAREGPT], {}),
            ("stanford", [ALPACA], {}),
            ("odd", odd, {"columns": {"prompt": "question", "completion": "answer"}}),
        )
    ]
    built = build_set(mixture_of(sources, tokenizer), tmp_path / "out")
    details = [source.details for source in built.manifest.sources]
    assert [d["format"] for d in details] == ["messages", "sharegpt", "alpaca", "prompt_completion"]
    assert details[3]["columns"] == {"prompt": "question", "completion": "answer"}
    assert [source["format"] for source in stats(built)["sources"]] == [
        d["format"] for d in details
    ]
    assert any("stanford" in line and "alpaca" in line for line in stats_lines(built))


def test_stating_the_detected_format_tokenises_nothing_again(
    tmp_path: Path, tokenizer: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [SHAREGPT])
    detected = build_set(mixture_of([path], tokenizer), tmp_path / "a", store=tmp_path / "s")
    before = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "s").glob("*/chunk-*/tokens.npy")
    }
    stated = build_set(
        mixture_of([{"path": str(path), "format": "sharegpt"}], tokenizer),
        tmp_path / "b",
        store=tmp_path / "s",
    )
    assert {
        file: file.stat().st_mtime_ns for file in (tmp_path / "s").glob("*/chunk-*/tokens.npy")
    } == before
    assert stated.manifest.fingerprint == detected.manifest.fingerprint


def test_the_same_file_in_another_format_has_other_samples(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{**ALPACA, **PAIR}])
    sets = [
        build_set(
            mixture_of([{"path": str(path), "format": name}], tokenizer),
            tmp_path / name,
            store=tmp_path / "store",
        )
        for name in ("alpaca", "prompt_completion")
    ]
    assert sets[0].manifest.fingerprint != sets[1].manifest.fingerprint


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"format": "alpca"}, "did you mean 'alpaca'"),
        ({"columns": {"promt": "q"}}, "columns maps promt; expected fields of one format"),
        ({"columns": {"prompt": "q", "output": "a"}}, "columns maps prompt, output"),
        ({"format": "alpaca", "columns": {"prompt": "q"}}, "of alpaca: instruction"),
        ({"columns": {"prompt": "q", "completion": "q"}}, "a different column for each field"),
        ({"columns": {"prompt": 1}}, "sources.0.columns.prompt = 1; expected text"),
    ],
)
def test_an_impossible_format_or_column_is_a_config_error(
    stated: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        config.build(
            MixtureConfig, mixture_of([{"path": "x.jsonl", **stated}], Path("t")), "test.toml"
        )


def test_columns_that_fit_no_row_stop_the_build(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [PAIR])
    source = {"path": str(path), "columns": {"prompt": "question"}}
    with pytest.raises(DataError, match="none of its first rows fits columns prompt = 'question'"):
        build_set(mixture_of([source], tokenizer), tmp_path / "out")


needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="the real data is not beside this checkout"
)


@needs_real_data
@pytest.mark.parametrize(
    "name", ["alpaca_en.json", "sharegpt_tools_en.json", "reason_tool_use.jsonl"]
)
def test_every_text_of_the_real_rows_is_read_in_order(name: str) -> None:
    data = (REAL_DATA / "raw" / name).read_bytes()
    rows = (
        orjson.loads(data)
        if name.endswith(".json")
        else [orjson.loads(line) for line in data.split(b"\n") if line]
    )
    conversion = detect(rows, {})
    assert conversion is not None
    for row in rows:
        assert texts(read_conversation(row, conversion, where=name)) == expected_texts(row)


def texts(conversation: Any) -> list[Any]:
    """Return all texts in order: reasoning before content, content before calls."""
    result: list[Any] = []
    for message in conversation.messages:
        result += [message[key] for key in ("reasoning_content", "content") if message.get(key)]
        result += [
            [c["function"]["name"], c["function"]["arguments"]]
            for c in message.get("tool_calls", ())
        ]
    return result


def expected_texts(row: dict[str, Any]) -> list[Any]:
    if "instruction" in row:
        return [row["instruction"] + (f"\n{row['input']}" if row["input"] else ""), row["output"]]
    if "conversations" in row:
        pairs = [(turn["value"], turn["from"] == "function_call") for turn in row["conversations"]]
    else:
        pairs = [
            (p["value"], p["type"] == "tool_call") for m in row["messages"] for p in m["content"]
        ]
    calls = [json.loads(text) if is_call else text for text, is_call in pairs]
    return [[item["name"], item["arguments"]] if isinstance(item, dict) else item for item in calls]
