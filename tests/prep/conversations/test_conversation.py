"""Conversations: what a template sees, and the error of a bad row."""

import json
import re
from typing import Any

import pytest

from prep.conversations.conversation import (
    Conversation,
    content_hash,
    parse_conversation,
    prompt_hash,
)
from shared.errors import DataError

WHERE = "chat.jsonl line 3 (row 2)"
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
CALL = {"id": "c0", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def parse(*messages: Any, **columns: Any) -> Conversation:
    return parse_conversation({"messages": list(messages), **columns}, where=WHERE)


def answer(**keys: Any) -> dict[str, Any]:
    return parse(HI, {"role": "assistant", **keys}).messages[1]


def test_text_is_not_changed() -> None:
    text = "  \n\u2028 <|im_end|> \x00 "
    assert parse({"role": "user", "content": text}).messages == ({"role": "user", "content": text},)


@pytest.mark.parametrize(
    "role",
    ["system", "developer", "user", "assistant", "tool", "function", "environment", "ipython"],
)
def test_every_known_role_is_accepted(role: str) -> None:
    assert parse({"role": role, "content": "x"}).messages[0]["role"] == role


def test_null_content_is_empty_text() -> None:
    assert answer(content=None)["content"] == ""


def test_content_may_be_absent_beside_a_call() -> None:
    assert answer(tool_calls=[CALL])["content"] == ""
    assert answer(function_calls="add(1)")["content"] == ""


def test_null_keys_are_absent_and_unknown_keys_pass() -> None:
    assert answer(content="x", name=None, tool_calls=None, mood="calm") == {
        "role": "assistant",
        "content": "x",
        "mood": "calm",
    }


def test_text_parts_are_joined_and_reasoning_parts_become_reasoning_content() -> None:
    parts = [
        {"type": "thinking", "thinking": "hm "},
        {"type": "reasoning", "text": "so"},
        {"type": "text", "text": "a"},
        {"type": "text", "value": "b"},
    ]
    assert answer(content=parts) == {
        "role": "assistant",
        "content": "ab",
        "reasoning_content": "hm so",
    }


def test_olmo_keys_pass_through() -> None:
    system = {"role": "system", "content": "s", "functions": "def add(a): ..."}
    reply = {"role": "assistant", "content": None, "function_calls": "add(1)"}
    messages = parse(system, HI, reply, {"role": "environment", "content": "2"}).messages
    assert messages[0]["functions"] == "def add(a): ..."
    assert messages[2] == {"role": "assistant", "content": "", "function_calls": "add(1)"}


def test_a_flat_tool_call_is_nested_and_keeps_its_id() -> None:
    call = answer(tool_calls=[{"id": "c0", "name": "add", "arguments": '{"a": 1}'}])["tool_calls"]
    assert call == [
        {"type": "function", "id": "c0", "function": {"name": "add", "arguments": '{"a": 1}'}}
    ]


def test_tool_call_arguments_stay_text_or_object_as_they_came() -> None:
    assert answer(tool_calls=[CALL])["tool_calls"] == [CALL]
    text = {**CALL, "function": {"name": "add", "arguments": '{"a":   1}'}}
    assert answer(tool_calls=[text])["tool_calls"] == [text]


def test_absent_tool_call_arguments_are_an_empty_object() -> None:
    assert (
        answer(tool_calls=[{"function": {"name": "now"}}])["tool_calls"][0]["function"]["arguments"]
        == {}
    )


def test_an_empty_tool_call_list_is_no_tool_call() -> None:
    assert "tool_calls" not in answer(content="x", tool_calls=[])


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools_in_any_spelling_is_none(tools: Any) -> None:
    assert parse(HI, tools=tools).tools is None


def test_tools_may_be_json_text() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert parse(HI, tools=json.dumps(tools)).tools == parse(HI, tools=tools).tools == tools


def test_train_and_weight_become_flags_and_leave_the_message() -> None:
    conversation = parse(
        HI, {**HELLO, "train": False}, HI, {**HELLO, "weight": 1}, {**HELLO, "weight": 0.0}
    )
    assert conversation.train == (None, False, None, True, False)
    assert conversation.messages[1] == HELLO


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, "no messages; the row has no columns"),
        (
            {"id": 1, "conversations": []},
            'no messages; the row has id, conversations; expected "messages"',
        ),
        ({"messages": "Hi"}, "messages is 'Hi'"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["Hi"]}, "messages[0] is 'Hi'; expected an object"),
        (
            {"messages": [HI, {"content": "x"}]},
            "messages[1].role is missing; expected system, developer",
        ),
        (
            {"messages": [HI, HELLO, {"role": "bot", "content": ""}]},
            "messages[2].role is 'bot'; expected system",
        ),
        ({"messages": [{"role": ["user"], "content": ""}]}, "messages[0].role is ['user']"),
        (
            {"messages": [{"role": "user"}]},
            "messages[0] has no content (null counts as none); it has role",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content is 5; expected a string, null or a list",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            "messages[0].content[0] is 'a'; expected a part of type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0] is of type 'image_url'; expected a part of type 'text'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "body": "a"}]}]},
            "messages[0].content[0] has the keys type, body; expected a string under text or value",
        ),
        ({"messages": [{**HELLO, "name": 7}]}, "messages[0].name is 7; expected a string"),
        (
            {"messages": [{**HELLO, "function_calls": [1]}]},
            "messages[0].function_calls is [1]; expected a string",
        ),
        (
            {"messages": [{**HELLO, "tool_calls": {"name": "f"}}]},
            "messages[0].tool_calls is {'name': 'f'}",
        ),
        (
            {"messages": [{**HELLO, "tool_calls": "[{"}]},
            "messages[0].tool_calls is text but not JSON",
        ),
        (
            {"messages": [{**HELLO, "tool_calls": [{"function": {}}]}]},
            "tool_calls[0].function.name is missing",
        ),
        (
            {"messages": [{**HELLO, "tool_calls": [{"name": "f", "arguments": 3}]}]},
            "tool_calls[0] has arguments 3",
        ),
        (
            {"messages": [{**HI, "tool_calls": [CALL]}]},
            "messages[0] has tool_calls but its role is 'user'",
        ),
        ({"messages": [HI], "tools": "[oops"}, "tools is text but not JSON"),
        ({"messages": [HI], "tools": {"a": 1}}, "tools is {'a': 1}; expected a list"),
        ({"messages": [HI], "tools": ["add"]}, "tools[0] is 'add'; expected an object"),
        (
            {"messages": [{**HI, "train": "no"}]},
            "messages[0].train is 'no'; expected true or false",
        ),
        ({"messages": [{**HI, "weight": 0.5}]}, "messages[0].weight is 0.5; expected 0 or 1"),
        ({"messages": [{**HI, "weight": 0, "train": True}]}, "has train = true and weight = 0"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "thinking", "text": "a"}],
                        "reasoning_content": "b",
                    }
                ]
            },
            "messages[0] has reasoning both in content and in reasoning_content",
        ),
    ],
)
def test_a_bad_row_is_refused_with_its_location_and_its_fault(
    record: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        parse_conversation(record, where=WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert expected in str(caught.value)


def test_a_long_value_is_shortened_in_a_message() -> None:
    with pytest.raises(DataError) as caught:
        parse({"role": "x" * 10_000, "content": ""})
    assert len(str(caught.value)) < 300


def test_equal_prompts_hash_alike_whatever_the_answer_the_tools_and_the_ids() -> None:
    one = prompt_hash(parse(HI, HELLO, tools=[{"name": "add"}]))
    assert len(one) == 16
    assert one == prompt_hash(
        parse({**HI, "message_id": "7"}, {**HELLO, "content": "Other"}, HI, HELLO)
    )
    assert one != prompt_hash(parse({"role": "user", "content": "Hi!"}, HELLO))
    assert one != prompt_hash(parse({"role": "system", "content": "s"}, HI, HELLO))


def test_a_greeting_before_the_question_belongs_to_the_prompt() -> None:
    other = {"role": "user", "content": "What is 2+2?"}
    assert prompt_hash(parse(HELLO, HI, HELLO)) != prompt_hash(parse(HELLO, other, HELLO))


def test_any_difference_changes_the_content_hash() -> None:
    conversations = [
        parse(HI, HELLO),
        parse(HI, {**HELLO, "content": "Hello!"}),
        parse(HI, {**HELLO, "train": False}),
        parse(HI, HELLO, tools=[{"name": "add"}]),
        parse(HI, {**HELLO, "mood": "calm"}),
    ]
    assert len({content_hash(conversation) for conversation in conversations}) == len(conversations)
    reordered = parse({"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"})
    assert content_hash(reordered) == content_hash(conversations[0])


def test_integers_beyond_64_bits_have_stable_and_different_hashes() -> None:
    def hashed(number: int) -> bytes:
        return content_hash(
            parse(HI, {**HELLO, "tool_calls": [{"name": "f", "arguments": {"b": number, "a": 1}}]})
        )

    assert hashed(2**70) == hashed(2**70)
    assert hashed(2**70) != hashed(2**70 + 1)


def test_ten_thousand_turns_are_one_conversation() -> None:
    conversation = parse(*[HI, HELLO] * 5000)
    assert len(conversation.messages) == len(conversation.train) == 10_000


CALL_PART = {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'}


def test_tool_calls_among_the_parts_of_a_message_are_its_tool_calls() -> None:
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "Wait."},
        CALL_PART,
        CALL_PART,
    ]
    record = {"messages": [{"role": "assistant", "content": parts}]}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert parse_conversation(record, where="here").messages == (
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "hm",
            "tool_calls": [call, call],
        },
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            {"role": "assistant", "content": [CALL_PART, {"type": "text", "text": "x"}]},
            "content[1] is text after a tool call; expected the calls of a message at its end",
        ),
        (
            {"role": "assistant", "content": [CALL_PART], "tool_calls": [{"name": "add"}]},
            "has tool calls both in content and in tool_calls; keep one of them",
        ),
        ({"role": "user", "content": [CALL_PART]}, "has tool_calls but its role is 'user'"),
        (
            {"role": "assistant", "content": [{"type": "tool_call"}]},
            "content[0][0] is None; expected an object",
        ),
        (
            {"role": "assistant", "content": [{"type": "tool_call", "value": "{"}]},
            "content[0] is text but not JSON",
        ),
    ],
)
def test_a_tool_call_part_in_the_wrong_place_is_refused(
    message: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError, match=re.escape(expected)):
        parse_conversation({"messages": [message]}, where="here")
