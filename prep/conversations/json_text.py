"""JSON text of a row -> values, strictly: what a parser would lose or choke on is an error that
says so.

    duplicate keys   orjson keeps the last value without a word; here the row is refused, and the
                     key is named
    integers         of more than 64 bits stay exact (orjson makes them floats), what no double can
                     hold is refused
    depth            at most MAX_DEPTH arrays and objects within each other, whatever walks, hashes
                     or dumps them

Looking for duplicates costs next to nothing where as many keys were parsed as the text can hold: a
key is a string before a colon, so a count of colons behind a quote is never too small. Only where
it is too large are keys listed.
"""

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from shared.errors import DataError, shorten

MAX_DEPTH = 64  # the row itself is the first level

_KEY = re.compile(rb'(?<!\\)"[ \t\r\n]*:')  # exact where no string ends in a backslash
_LONG_INTEGER = re.compile(rb"\d{19}")  # from here an integer may not fit 64 bits
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
    """Return the value of a JSON text that holds at most `most_keys` keys, and perhaps long
    integers.

    It is a row, or a text `within_row`. Raises DataError, which begins with `at`.
    """
    try:
        value = orjson.loads(data)
        if exact_integers and _LONG_INTEGER.search(data):
            value = _exact(data, at)
    except orjson.JSONDecodeError as exc:
        if "depth limit" in exc.msg or "recursion limit" in exc.msg:
            raise DataError(_too_deep(at, "it")) from exc
        bad_utf8 = exc.msg.startswith("str is not valid UTF-8")
        what = (
            "not valid UTF-8"
            if bad_utf8
            else f"not valid JSON at character {exc.pos + 1}: {exc.msg}"
        )
        inner = f"{at} is text but not JSON: {exc.msg} at character {exc.pos + 1}"
        raise DataError(inner if within_row else f"{at}: {what}; correct the row") from exc
    if most_keys != _keys_of_a_chat(value) and most_keys != num_keys(value):
        _refuse_duplicates(data, value, at)
    check_depth(value, at, brackets=data.count(b"{") + data.count(b"["))
    return value


def most_keys(data: bytes, bounds: npt.NDArray[np.int64]) -> list[int]:
    """Return for each piece of `data` between two of `bounds` a number of keys that it cannot
    exceed."""
    found = np.frombuffer(data, np.uint8)
    colons = np.flatnonzero(found == ord(":"))
    before = found[np.maximum(colons - 1, 0)]
    escape, escaped_escape = (found[np.maximum(colons - back, 0)] == ord("\\") for back in (2, 3))
    may_be_key = _SPACE[before] | ((before == ord('"')) & (~escape | escaped_escape))
    return [int(number) for number in np.diff(np.searchsorted(colons[may_be_key], bounds))]


def has_long_integers(data: bytes) -> bool:
    """Say whether `data` has so many digits on end that orjson may not read them exactly."""
    return b"0" * 19 in data.translate(_DIGITS_TO_ZERO)


def check_depth(value: Any, at: str, *, brackets: int = MAX_DEPTH + 1) -> None:
    """Raise DataError for a value that is nested too deep; fewer brackets than that need no
    look."""
    if brackets <= MAX_DEPTH:
        return
    level = _containers([[value]])
    for _ in range(MAX_DEPTH):
        level = _containers(level)
        if not level:
            return
    raise DataError(_too_deep(at, _path_to_depth(value)))


def without_nulls(value: Any) -> Any:
    """Return `value` without the keys that are null: a Parquet file has them wherever a row has not
    the key at all."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def num_keys(value: Any) -> int:
    """Return how many keys all objects within `value` have together."""
    total, level = 0, _containers([[value]])
    while level:
        total += sum(len(item) for item in level if type(item) is dict)
        level = _containers(level)
    return total


def _containers(level: list[Any]) -> list[Any]:
    """Return the objects and arrays one level within those of `level`."""
    return [
        child
        for parent in level
        for child in (parent.values() if type(parent) is dict else parent)
        if type(child) in (dict, list, tuple)
    ]


def _keys_of_a_chat(value: Any) -> int:
    """Return the keys of a row whose only objects are its messages, which most rows are; -1 where
    it cannot be one."""
    messages = value.get("messages") if type(value) is dict else None
    if type(messages) is not list or set(map(type, messages)) != {dict}:
        return -1
    return len(value) + sum(map(len, messages))


def _exact(data: bytes, at: str) -> Any:
    try:
        return json.loads(data)
    except RecursionError as exc:
        raise DataError(_too_deep(at, "it")) from exc
    except ValueError as exc:  # an integer of more digits than Python reads
        raise DataError(f"{at}: a number in it cannot be read: {exc}; correct the row") from exc


def _refuse_duplicates(data: bytes, value: Any, at: str) -> None:
    """Raise DataError for an object that has a key twice."""
    if b'\\\\"' not in data and len(_KEY.findall(data)) == num_keys(value):
        return

    def checked(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise DataError(
                    f"{at}: the key {_short(key)} stands twice in one object; keep one of them"
                )
            seen.add(key)

    try:
        json.loads(data, object_pairs_hook=checked, parse_int=len)
    except RecursionError as exc:
        raise DataError(_too_deep(at, "it")) from exc


def _too_deep(at: str, what: str) -> str:
    return (
        f"{at}: {what} is nested more than {MAX_DEPTH} levels deep; expected at most that, or text"
    )


def _path_to_depth(value: Any) -> str:
    """Return where a value is nested too deep, by its first steps:
    messages[1].tool_calls[0].function."""
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
    steps = [step for _, step in path[1:]]
    return "".join(steps[:6]).removeprefix(".") or "the row"


def _children(value: Any) -> list[tuple[Any, str]]:
    pairs = value.items() if type(value) is dict else enumerate(value)
    is_dict = type(value) is dict
    return [
        (child, f".{_short(key, quoted=False)}" if is_dict else f"[{key}]")
        for key, child in pairs
        if type(child) in (dict, list, tuple)
    ]


def _short(key: Any, *, quoted: bool = True) -> str:
    return shorten(repr(key) if quoted else str(key), 60)
