"""Read a raw record of any format as messages and tools.

A source has one format, stated in the mixture or detected once; a row of another one is an error.

    messages            messages: [{role, content, ...}], tools                     OpenAI's
    sharegpt            conversations: [{from, value}], system, tools
    alpaca              instruction, input, output, system, history: [[user, assistant], ...], tools
    prompt_completion   prompt, completion: text or lists of messages, system, tools

`columns` maps these names to those of a data set: {messages = "dialog", role = "speaker"}. Text is
never changed, except that Alpaca's input follows its instruction on a new line.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from prep.config import FIELDS, Format
from prep.conversations.conversation import Conversation, parse_conversation
from prep.conversations.json_text import loads
from shared.errors import DataError, show

# the columns in which messages are searched for, in this order
_LIST_COLUMNS = ("messages", "conversations", "conversation")
# the columns by which the formats without such a list are recognised
_TEXT_FIELDS = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_MAX_ROWS_TO_DETECT = 64
_MAX_GROUP_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Conversion:
    """What the rows of one source look like."""

    format: Format = "messages"
    # (name in FIELDS, name in the source), where they differ
    columns: tuple[tuple[str, str], ...] = ()
    # the column that names the group a row belongs to
    split_by: str = ""

    def column(self, field: str) -> str:
        """Return the source's name for `field`."""
        return dict(self.columns).get(field, field)

    def __str__(self) -> str:
        renamed = ", ".join(f"{field} = {column!r}" for field, column in self.columns)
        return f"{self.format} ({renamed})" if renamed else self.format


PLAIN_MESSAGES = Conversion()


def detect(records: Iterable[Any], columns: Mapping[str, str]) -> Conversion | None:
    """Return the format of the first record that fits one, with its names mapped by `columns`.

    None if none of the first 64 records does.
    """
    for record in islice(records, _MAX_ROWS_TO_DETECT):
        if isinstance(record, dict):
            for name, fields in FIELDS.items():
                conversion = _fit(record, name, columns) if set(columns) <= set(fields) else None
                if conversion is not None:
                    return conversion
    return None


def read_conversation(
    record: dict[str, Any], conversion: Conversion, *, where: str
) -> Conversation:
    """Return the conversation in a record. Raises DataError, which names the field as the source
    does."""
    # A plain record is not copied: its messages are checked where they are.
    messages, tools = _CONVERTERS[conversion.format](record, conversion, where)
    if messages is None:
        return parse_conversation(record, where=where)
    try:
        return parse_conversation({"messages": messages, "tools": tools}, where=where)
    except DataError as exc:
        raise DataError(f"{exc} (messages as read from {conversion})") from exc


def read_group(record: dict[str, Any], conversion: Conversion, *, where: str) -> str:
    """Return the group of its source that a record belongs to, "" if it names none. Raises
    DataError."""
    value = record.get(conversion.split_by, "") if conversion.split_by else ""
    if value is None:
        return ""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.isprintable() or len(text) > _MAX_GROUP_CHARACTERS:
        raise DataError(
            f"{where}: {conversion.split_by} is {show(value)}; expected a name of at most"
            f" {_MAX_GROUP_CHARACTERS} printable characters, because split_by names this column"
        )
    return text


def _fit(record: dict[str, Any], name: Format, columns: Mapping[str, str]) -> Conversion | None:
    """Return how `record` is a row of format `name`, or None."""
    conversion = Conversion(name, tuple(sorted(columns.items())))
    if name in _TEXT_FIELDS:
        has_all = all(conversion.column(field) in record for field in _TEXT_FIELDS[name])
        return conversion if has_all else None
    # The other formats are a list of messages, which data sets keep under one of three names.
    field, key = ("messages", "role") if name == "messages" else ("conversations", "from")
    for column in [columns[field]] if field in columns else _LIST_COLUMNS:
        messages = record.get(column)
        if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
            continue
        if conversion.column(key) in messages[0]:
            renamed = {**columns, field: column} if column != field else columns
            return Conversion(name, tuple(sorted(renamed.items())))
    return None


# messages and tools; None for the messages of a record that needs no conversion
_Converted = tuple[list[Any] | None, Any]


def _from_messages(record: dict[str, Any], conversion: Conversion, where: str) -> _Converted:
    if not conversion.columns:
        return None, None
    column = conversion.column("messages")
    messages = _list_of(record, column, where, conversion)
    role, content = conversion.column("role"), conversion.column("content")
    if (role, content) != ("role", "content"):
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or role not in message:
                raise DataError(
                    f"{where}: {column}[{index}] is {show(message)}; expected an object with {role}"
                )
        # A key that was called role or content before gives way to the renamed one.
        messages = [
            {"role": message[role]}
            | ({"content": message[content]} if content in message else {})
            | {
                key: value
                for key, value in message.items()
                if key not in (role, content, "role", "content")
            }
            for message in messages
        ]
    return messages, record.get(conversion.column("tools"))


def _from_sharegpt(record: dict[str, Any], conversion: Conversion, where: str) -> _Converted:
    column, from_key, value_key = (
        conversion.column(name) for name in ("conversations", "from", "value")
    )
    turns = _list_of(record, column, where, conversion)
    messages = _system(record, conversion, where)
    for index, turn in enumerate(turns):
        at = f"{where}: {column}[{index}]"
        if not isinstance(turn, dict):
            raise DataError(
                f"{at} is {show(turn)}; expected an object with {from_key} and {value_key}"
            )
        speaker, value = turn.get(from_key), turn.get(value_key)
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            seen = f"is {show(speaker)}" if from_key in turn else "is missing"
            raise DataError(f"{at}.{from_key} {seen}; expected {', '.join(_SHAREGPT_ROLES)}")
        # a system turn comes first, and only if there is no system column
        if role == "system" and messages:
            raise DataError(
                f"{at}.{from_key} is 'system'; expected it at most once, before all others"
            )
        message = {
            key: item
            for key, item in turn.items()
            if key not in (from_key, value_key, "role", "content")
        }
        if speaker == "function_call":
            # one call or a list of calls, mostly as JSON text
            calls = loads(value, f"{at}.{value_key}") if isinstance(value, str) else value
            calls = [calls] if isinstance(calls, dict) else calls
            if not (calls and isinstance(calls, list)) or not all(
                isinstance(call, dict)
                and isinstance(function := call.get("function", call), dict)
                and isinstance(function.get("name"), str)
                for call in calls
            ):
                raise DataError(
                    f"{at}.{value_key} is {show(value)}; expected"
                    ' {"name": ..., "arguments": ...} or a list of such calls'
                )
            message["tool_calls"] = calls
            value = ""
        elif not isinstance(value, str):
            seen = f"is {show(value)}" if value_key in turn else "is missing"
            raise DataError(f"{at}.{value_key} {seen}; expected a string")
        messages.append({**message, "role": role, "content": value})
    return messages, _nested_tools(record, conversion, where)


def _from_alpaca(record: dict[str, Any], conversion: Conversion, where: str) -> _Converted:
    messages = _system(record, conversion, where)
    column = conversion.column("history")
    history = record.get(column)
    if not isinstance(history, list | None):
        raise DataError(
            f"{where}: {column} is {show(history)}; expected a list of pairs of strings"
        )
    for index, pair in enumerate(history or ()):
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(text, str) for text in pair)
        ):
            raise DataError(
                f"{where}: {column}[{index}] is {show(pair)}; expected [what the user said,"
                " the answer]"
            )
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    instruction, output = (
        _text(record, name, where, conversion) for name in ("instruction", "output")
    )
    context = _text(record, "input", where, conversion, default="")
    question = "\n".join(text for text in (instruction, context) if text)
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return messages, _nested_tools(record, conversion, where)


def _from_prompt_completion(
    record: dict[str, Any], conversion: Conversion, where: str
) -> _Converted:
    messages = _system(record, conversion, where)
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        column = conversion.column(field)
        value = record.get(column)
        if isinstance(value, str):
            messages.append({"role": role, "content": value})
            continue
        if not isinstance(value, list) or not value:
            raise _other_shape(record, column, where, conversion, "a string or a list of messages")
        # messages in OpenAI's form, whose roles parse_conversation checks
        for index, message in enumerate(value):
            if not isinstance(message, dict) or "role" not in message:
                raise DataError(
                    f"{where}: {column}[{index}] is {show(message)}; expected an object with"
                    " role, content"
                )
            # what an assistant wrote in a prompt is not to be learnt, unless the row asks for it
            has_flag = message.get("train") is not None or message.get("weight") is not None
            if field == "prompt" and message["role"] == "assistant" and not has_flag:
                message = {**message, "train": False}
            messages.append(message)
    return messages, _nested_tools(record, conversion, where)


_CONVERTERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}


def _system(record: dict[str, Any], conversion: Conversion, where: str) -> list[dict[str, Any]]:
    text = _text(record, "system", where, conversion, default="")
    return [{"role": "system", "content": text}] if text else []


def _text(
    record: dict[str, Any],
    field: str,
    where: str,
    conversion: Conversion,
    *,
    default: str | None = None,
) -> str:
    column = conversion.column(field)
    value = record.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise _other_shape(record, column, where, conversion, "a string")
    return value


def _list_of(record: dict[str, Any], column: str, where: str, conversion: Conversion) -> list[Any]:
    value = record.get(column)
    if not isinstance(value, list) or not value:
        raise _other_shape(record, column, where, conversion, "a list of messages")
    return value


def _other_shape(
    record: dict[str, Any], column: str, where: str, conversion: Conversion, expected: str
) -> DataError:
    if column in record:
        seen = f"{column} is {show(record[column])}"
    else:
        seen = f"no {column}; the row has {', '.join(map(str, record)) or 'no columns'}"
    return DataError(
        f"{where}: {seen}; expected {expected}, because the format of this source is {conversion}"
    )


def _nested_tools(record: dict[str, Any], conversion: Conversion, where: str) -> Any:
    """Return tools in OpenAI's nested form, which the templates of models print."""
    column = conversion.column("tools")
    tools = record.get(column)
    if isinstance(tools, str) and tools.strip():
        tools = loads(tools, f"{where}: {column}")
    if not isinstance(tools, list):
        return tools
    return [
        {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}
        if isinstance(tool, dict) and "function" not in tool and "name" in tool
        else tool
        for tool in tools
    ]
