"""Parse the JSON text of a row strictly: nothing is lost silently, and nothing is too deep to walk.

    duplicate keys   orjson keeps the last value silently; here the row is refused, and the key is
                     named
    integers         of more than 64 bits stay exact (orjson makes them floats); what no double can
                     hold is refused
    depth            at most MAX_DEPTH nested arrays and objects, so that code may recurse

The check for duplicates costs next to nothing: a key is a string before a colon, so a text has at
most as many keys as colons behind a quote. Only if fewer keys were parsed are they listed.
"""

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from shared.errors import DataError, show

# the row itself is the first level
MAX_DEPTH = 64

# exact unless a string ends in a backslash
_KEY = re.compile(rb'(?<!\\)"[ \t\r\n]*:')
# an integer of 19 digits and more may not fit 64 bits
_LONG_INTEGER = re.compile(rb"\d{19}")
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_SPACE = np.isin(np.arange(256), np.frombuffer(b" \t\r\n", np.uint8))  # bool [256]


def loads(text: str, at: str) -> Any:
    """Return the value of a JSON text within a row. Raises DataError, which begins with `at`."""
    try:
        data = text.encode("utf-8")
        (keys,) = most_keys(data, np.array([0, len(data)]))
        return parse(
            data, at, most_keys=keys, exact_integers=has_long_integers(data), within_row=True
        )
    except UnicodeEncodeError as exc:
        raise DataError(f"{at} is text but not Unicode: {exc}") from exc


def parse(
    data: bytes, at: str, *, most_keys: int, exact_integers: bool, within_row: bool = False
) -> Any:
    """Return the value of a JSON text with at most `most_keys` keys and, if `exact_integers`, long
    integers.

    The text is a row, or a string `within_row`. Raises DataError, which begins with `at`.
    """
    try:
        value = orjson.loads(data)
        # orjson has refused integers beyond 1.8e308, so int() never meets its limit of 4300 digits
        if exact_integers and _LONG_INTEGER.search(data):
            value = json.loads(data)
    except orjson.JSONDecodeError as exc:
        if "depth limit" in exc.msg or "recursion limit" in exc.msg:
            raise DataError(_too_deep(at, "it")) from exc
        if within_row:
            raise DataError(
                f"{at} is text but not JSON: {exc.msg} at character {exc.pos + 1}"
            ) from exc
        bad_utf8 = exc.msg.startswith("str is not valid UTF-8")
        fault = "UTF-8" if bad_utf8 else f"JSON at character {exc.pos + 1}: {exc.msg}"
        raise DataError(f"{at}: not valid {fault}; correct the row") from exc
    except RecursionError as exc:
        raise DataError(_too_deep(at, "it")) from exc
    # The objects of most rows are the row and its messages: their keys are counted without a walk.
    keys = -1
    messages = value.get("messages") if type(value) is dict else None
    if type(messages) is list and set(map(type, messages)) == {dict}:
        keys = len(value) + sum(map(len, messages))
    if most_keys != keys and most_keys != num_keys(value):
        _refuse_duplicates(data, value, at)
    check_depth(value, at, brackets=data.count(b"{") + data.count(b"["))
    return value


def most_keys(data: bytes, bounds: npt.NDArray[np.int64]) -> list[int]:
    """Return, for each piece of `data` between two of `bounds`, the most keys that it can hold."""
    text = np.frombuffer(data, np.uint8)
    colons = np.flatnonzero(text == ord(":"))
    before = text[np.maximum(colons - 1, 0)]
    # `\":` is within a string, `\\":` may end one
    escape, escaped_escape = (text[np.maximum(colons - back, 0)] == ord("\\") for back in (2, 3))
    may_be_key = _SPACE[before] | ((before == ord('"')) & (~escape | escaped_escape))
    return [int(number) for number in np.diff(np.searchsorted(colons[may_be_key], bounds))]


def has_long_integers(data: bytes) -> bool:
    """Say whether `data` has so many digits in a row that orjson may not read them exactly."""
    return b"0" * 19 in data.translate(_DIGITS_TO_ZERO)


def check_depth(value: Any, at: str, *, brackets: int = MAX_DEPTH + 1) -> None:
    """Raise DataError if a value is nested too deep, which takes more than MAX_DEPTH `brackets`."""
    if brackets <= MAX_DEPTH:
        return
    level = _containers([[value]])
    for _ in range(MAX_DEPTH):
        level = _containers(level)
        if not level:
            return
    # Name it by its first steps, messages[1].tool_calls[0].function: walk in depth until there.
    path: list[tuple[Any, str]] = [(value, "")]
    stack = [iter(_children(value))]
    while len(stack) <= MAX_DEPTH:
        child = next(stack[-1], None)
        if child is None:
            stack.pop()
            path.pop()
            continue
        path.append(child)
        stack.append(iter(_children(child[0])))
    steps = "".join(step for _, step in path[1:7])
    raise DataError(_too_deep(at, steps.removeprefix(".") or "the row"))


def without_nulls(value: Any) -> Any:
    """Return `value` without the keys that are null: Parquet has one for every key a row lacks."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def num_keys(value: Any) -> int:
    """Return the number of keys of all objects in `value`."""
    total, level = 0, _containers([[value]])
    while level:
        total += sum(len(item) for item in level if type(item) is dict)
        level = _containers(level)
    return total


def _containers(level: list[Any]) -> list[Any]:
    """Return the objects and arrays directly inside those of `level`."""
    return [
        child
        for parent in level
        for child in (parent.values() if type(parent) is dict else parent)
        if type(child) in (dict, list, tuple)
    ]


def _refuse_duplicates(data: bytes, value: Any, at: str) -> None:
    """Raise DataError if an object has a key twice."""
    if b'\\\\"' not in data and len(_KEY.findall(data)) == num_keys(value):
        return

    def check_object(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise DataError(
                    f"{at}: the key {show(key)} occurs twice in one object; keep one of them"
                )
            seen.add(key)

    try:
        json.loads(data, object_pairs_hook=check_object, parse_int=len)
    except RecursionError as exc:
        raise DataError(_too_deep(at, "it")) from exc


def _too_deep(at: str, what: str) -> str:
    return (
        f"{at}: {what} is nested more than {MAX_DEPTH} levels deep; expected at most {MAX_DEPTH}"
        " levels, or the value as JSON text"
    )


def _children(value: Any) -> list[tuple[Any, str]]:
    """Return the objects and arrays directly inside `value`, each with the step to it."""
    is_dict = type(value) is dict
    return [
        (child, f".{key:.60}" if is_dict else f"[{key}]")
        for key, child in (value.items() if is_dict else enumerate(value))
        if type(child) in (dict, list, tuple)
    ]
