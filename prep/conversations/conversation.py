"""Check a raw record and turn it into a conversation. Errors name file, line, row and field.

A template sees plain dicts. `content` is always a string; flat tool calls have become
`{"function": {...}}`; unknown keys pass through; and keys whose value is null are absent, so that
the same rows in Parquet and in JSON give the same conversation. Text is never changed: no strip, no
handling of special tokens.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson

from prep.conversations.json_text import loads
from shared.errors import DataError, show

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "environment", "ipython")

# who can ask the question that the first answer follows; a greeting before it is part of the prompt
_ASKING_ROLES = frozenset(ROLES) - {"system", "developer", "assistant"}

# keys of a message that must be strings, besides its content
_STRING_KEYS = ("reasoning_content", "function_calls", "functions", "tool_call_id", "name")
# types of content parts that are reasoning -> the keys that may have their text
_REASONING_PARTS = {
    "reasoning": ("text", "reasoning", "value"),
    "thinking": ("text", "thinking", "value"),
}
# two prompts are equal if these are; ids and other keys of a data set do not count
_PROMPT_KEYS = (
    "role",
    "content",
    "name",
    "reasoning_content",
    "tool_calls",
    "function_calls",
    "functions",
)


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[dict[str, Any], ...]
    tools: list[dict[str, Any]] | None
    train: tuple[bool | None, ...]
    """Per message: its `train` or `weight` as a flag; None leaves it to the mask policy."""


def parse_conversation(record: dict[str, Any], *, where: str) -> Conversation:
    """Return the conversation in `record`; `where` locates it, e.g. `chat.jsonl line 3 (row 2)`.

    Raises DataError.
    """
    messages = record.get("messages")
    if not isinstance(messages, list):
        if "messages" in record:
            seen = f"messages is {show(messages)}"
        else:
            seen = f"no messages; the row has {', '.join(map(str, record)) or 'no columns'}"
        raise DataError(
            f'{where}: {seen}; expected "messages": [{{"role": ..., "content": ...}}, ...], '
            "or a format or columns that the mixture states for the source"
        )
    if not messages:
        raise DataError(f"{where}: messages is empty; expected at least one message")
    parsed = []
    train: list[bool | None] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(
                f"{where}: messages[{index}] is {show(message)}; expected an object with role"
                " and content"
            )
        role = message.get("role")
        if role not in ROLES:
            raise DataError(
                f"{where}: messages[{index}].role {_is(message, 'role')}; expected {_or(ROLES)}"
            )
        # nearly every message has a role and a text, and nothing else to check
        if len(message) == 2 and type(message.get("content")) is str:
            parsed.append({"role": role, "content": message["content"]})
            train.append(None)
            continue
        at = f"{where}: messages[{index}]"
        train.append(_train_flag(message, at))
        parsed.append(_parse_message(message, at))
    tools = _from_json_text(record.get("tools"), f"{where}: tools") or None
    if not isinstance(tools, list | None):
        raise DataError(
            f"{where}: tools is {show(tools)}; expected a list of tool descriptions or its"
            " JSON text"
        )
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            raise DataError(f"{where}: tools[{index}] is {show(tool)}; expected an object")
    return Conversation(tuple(parsed), tools, tuple(train))


def prompt_hash(conversation: Conversation) -> bytes:
    """Return 16 bytes that are equal for equal prompts, whatever the answers. The eval split uses
    them.

    The prompt is all messages before the first assistant message that answers one; a conversation
    without an answer is all prompt. Tools and unknown keys do not count.
    """
    has_question = False
    prompt = []
    for message in conversation.messages:
        if has_question and message["role"] == "assistant":
            break
        has_question = has_question or message["role"] in _ASKING_ROLES
        prompt.append({key: message[key] for key in _PROMPT_KEYS if key in message})
    return _hash16(prompt)


def content_hash(conversation: Conversation) -> bytes:
    """Return 16 bytes that are equal for equal messages, tools and train flags, and only then."""
    return _hash16([conversation.messages, conversation.tools, conversation.train])


def calls_not_json(conversation: Conversation) -> int:
    """Return how many tool calls have arguments that are text but no JSON object. Templates print
    them unchanged."""
    arguments = [
        call["function"]["arguments"]
        for message in conversation.messages
        if len(message) > 2
        for call in message.get("tool_calls", ())
    ]
    count = 0
    for text in arguments:
        try:
            count += isinstance(text, str) and not isinstance(orjson.loads(text), dict)
        except orjson.JSONDecodeError:
            count += 1
    return count


def _parse_message(message: dict[str, Any], at: str) -> dict[str, Any]:
    parsed = {
        key: value
        for key, value in message.items()
        if value is not None and key not in ("train", "weight")
    }
    for key in _STRING_KEYS:
        if key in parsed and not isinstance(parsed[key], str):
            raise DataError(f"{at}.{key} is {show(parsed[key])}; expected a string")
    calls = parsed.pop("tool_calls", None)
    if calls:
        parsed["tool_calls"] = _parse_tool_calls(calls, f"{at}.tool_calls")
    if "content" not in message and not calls and "function_calls" not in parsed:
        raise DataError(f"{at} has no content (null counts as none); it has {', '.join(message)}")
    parsed["content"], reasoning, calls = _parse_content(parsed.get("content"), f"{at}.content")
    for key, what, value in (
        ("reasoning_content", "reasoning", reasoning),
        ("tool_calls", "tool calls", calls),
    ):
        if value and parsed.get(key):
            raise DataError(f"{at} has {what} both in content and in {key}; keep one of them")
        if value:
            parsed[key] = value
    # Calls and reasoning are an assistant's; an empty reasoning of another role is dropped.
    if parsed["role"] != "assistant":
        for key in ("tool_calls", "reasoning_content"):
            if parsed.get(key):
                raise DataError(
                    f"{at} has {key} but its role is {parsed['role']!r}; expected 'assistant'"
                )
        parsed.pop("reasoning_content", None)
    return parsed


def _parse_content(content: Any, at: str) -> tuple[str, str, list[dict[str, Any]]]:
    """Return (text, reasoning, tool calls) of a message's content: a string, null or typed parts.

    Texts of parts are joined without change. A template prints calls after the text, so text may
    not follow a call.
    """
    if not isinstance(content, list):
        if not isinstance(content, str | None):
            raise DataError(
                f"{at} is {show(content)}; expected a string, null or a list of text parts"
            )
        return content or "", "", []
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text.append(_part_string(part, ("text", "value"), f"{at}[{index}]"))
            if calls and text[-1].strip():
                raise DataError(
                    f"{at}[{index}] is text after a tool call; expected the calls of a message at"
                    " its end"
                )
        elif isinstance(kind, str) and kind in _REASONING_PARTS:
            reasoning.append(_part_string(part, _REASONING_PARTS[kind], f"{at}[{index}]"))
        elif kind == "tool_call":
            call = _from_json_text(part.get("tool_call", part.get("value")), f"{at}[{index}]")
            calls += _parse_tool_calls([call], f"{at}[{index}]")
        else:
            seen = f"of type {show(kind)}" if kind is not None else show(part)
            raise DataError(
                f"{at}[{index}] is {seen}; expected a part of type 'text', 'reasoning', 'thinking'"
                " or 'tool_call'"
            )
    return "".join(text), "".join(reasoning), calls


def _part_string(part: dict[str, Any], keys: tuple[str, ...], at: str) -> str:
    for key in keys:
        if isinstance(part.get(key), str):
            return str(part[key])
    raise DataError(f"{at} has the keys {', '.join(part)}; expected a string under {_or(keys)}")


def _parse_tool_calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """Return calls in OpenAI's nested form. Arguments stay a string or an object; absent ones are
    {}."""
    calls = _from_json_text(calls, at)
    if not isinstance(calls, list):
        raise DataError(f"{at} is {show(calls)}; expected a list of calls")
    parsed = []
    for index, call in enumerate(calls):
        if not isinstance(call, dict):
            raise DataError(f"{at}[{index}] is {show(call)}; expected an object with a function")
        # OpenAI nests name and arguments in `function`, other data sets have them side by side
        nested = isinstance(call.get("function"), dict)
        function = call["function"] if nested else call
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not name:
            field = "function.name" if "function" in call else "name"
            raise DataError(
                f"{at}[{index}].{field} {_is(function, 'name')}; expected the name of a function"
            )
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, str | dict):
            raise DataError(
                f"{at}[{index}] has arguments {show(arguments)}; expected an object or a JSON"
                " string"
            )
        if nested:
            parsed.append({**call, "function": {**function, "arguments": arguments}})
        else:
            others = {
                key: value
                for key, value in call.items()
                if key not in ("name", "arguments", "function")
            }
            parsed.append(
                {"type": "function", **others, "function": {"name": name, "arguments": arguments}}
            )
    return parsed


def _train_flag(message: dict[str, Any], at: str) -> bool | None:
    # `weight` is OpenAI's name for the same flag, as 0 or 1
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{at}.train is {show(train)}; expected true or false")
    if weight is None:
        return train
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{at}.weight is {show(weight)}; expected 0 or 1")
    if train is not None and train != bool(weight):
        raise DataError(
            f"{at} has train = {str(train).lower()} and weight = {weight}; keep one of them"
        )
    return bool(weight)


def _from_json_text(value: Any, at: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    return loads(value, at)


def _is(table: dict[str, Any], key: str) -> str:
    return f"is {show(table[key])}" if key in table else "is missing"


def _or(choices: tuple[str, ...]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def _hash16(value: Any) -> bytes:
    try:
        text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        # integers beyond 64 bits, and types that only Arrow has: any unambiguous, stable text does
        text = repr(_sorted(value)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((str(key), _sorted(item)) for key, item in value.items())
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value
