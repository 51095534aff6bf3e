"""JSON text: values as json reads them, errors for what another parser drops silently."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.conversations.json_text import (
    MAX_DEPTH,
    check_depth,
    has_long_integers,
    loads,
    most_keys,
    num_keys,
    parse,
    without_nulls,
)
from shared.errors import DataError, show

AT = "rows.jsonl line 1 (row 0)"
# what may look like the end of a key, or hide one
ODD = ["a", "b", ":", '"', '":', "\\", '\\":', "\\\\", "{", "x\n", "\u2028", ""]
a_string = st.lists(st.sampled_from(ODD), max_size=3).map("".join)
a_scalar = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | a_string
a_value = st.recursive(
    a_scalar.filter(lambda value: value not in (float("inf"), -float("inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(a_string, inner, max_size=3),
    max_leaves=12,
)


def parsed(text: str) -> Any:
    data = text.encode()
    (keys,) = most_keys(data, np.array([0, len(data)]))
    return parse(data, AT, most_keys=keys, exact_integers=has_long_integers(data))


@given(value=a_value, indent=st.none() | st.integers(0, 1), ascii_only=st.booleans())
@settings(deadline=None, max_examples=300)
def test_a_value_is_the_one_that_was_written(
    value: Any, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert parsed(text) == loads(text, AT) == value


@given(values=st.lists(a_value, min_size=1, max_size=4), separators=st.sampled_from([":", " \t: "]))
@settings(deadline=None, max_examples=200)
def test_no_text_has_more_keys_than_are_counted_before_it_is_parsed(
    values: list[Any], separators: str
) -> None:
    texts = [
        json.dumps(value, separators=(",", separators), ensure_ascii=False).encode() + b"\n"
        for value in values
    ]
    bounds = np.cumsum([0, *map(len, texts)])
    limits = most_keys(b"".join(texts), bounds)
    assert all(num_keys(v) <= limit for v, limit in zip(values, limits, strict=True))


@given(
    pairs=st.lists(st.tuples(a_string, a_value), min_size=1, max_size=4),
    space=st.sampled_from(["", " ", "\n\t"]),
    outer=st.sampled_from(["%s", '{"messages": [%s, {"role": "x"}]}', '[[], {"": [%s]}]']),
    escaped=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_an_object_with_a_key_twice_is_refused_wherever_it_is(
    pairs: list[tuple[str, Any]], space: str, outer: str, escaped: bool
) -> None:
    def spell(key: str) -> str:
        points = "".join(f"\\u{ord(char):04x}" for char in key)
        return f'"{points}"' if escaped else json.dumps(key)

    names = [name for name, _ in pairs]
    # the last key is spelled otherwise: it is the key that counts, not its bytes
    keys = [*map(json.dumps, names[:-1]), spell(names[-1])]
    members = (f"{key}{space}:{json.dumps(v)}" for key, (_, v) in zip(keys, pairs, strict=True))
    text = outer % ("{" + ",".join(members) + "}")
    if len(set(names)) == len(names):
        assert parsed(text) == json.loads(text)
        return
    with pytest.raises(DataError, match="occurs twice in one object; keep one of them") as caught:
        parsed(text)
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    assert repr(repeated[0]) in str(caught.value)


@pytest.mark.parametrize("kind", ["object", "list"])
@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 250, 20_000])
def test_a_value_may_have_64_levels_and_no_more(kind: str, depth: int) -> None:
    opening, closing = ('{"a":', "}") if kind == "object" else ("[", "]")
    text = opening * depth + "1" + closing * depth
    if depth <= MAX_DEPTH:
        assert parsed(text) == json.loads(text)
        check_depth(json.loads(text), AT)
        return
    with pytest.raises(DataError, match="nested more than 64 levels deep; expected at most 64"):
        parsed(text)
    with pytest.raises(DataError, match="nested more than 64 levels deep"):
        loads(text, AT)


def test_a_value_that_is_too_deep_is_named_by_its_first_steps() -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    with pytest.raises(DataError, match=r": messages\[1\]\.function\[0\]\[0\]\[0\] is nested"):
        check_depth({"messages": ["x", {"other": [], "function": deep}]}, AT)


def test_a_value_is_not_walked_if_it_has_too_few_brackets_to_be_deep() -> None:
    endless: list[Any] = []
    endless.append(endless)
    check_depth(endless, AT, brackets=MAX_DEPTH)
    with pytest.raises(DataError):
        check_depth(endless, AT, brackets=MAX_DEPTH + 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "tools is text but not JSON: unexpected end of data at character 2"),
        ('"\ud800"', "tools is text but not Unicode"),
        ('{"a":1,"a":2}', "tools: the key 'a' occurs twice"),
    ],
)
def test_text_within_a_row_that_is_no_json_is_an_error_of_its_field(
    text: str, expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        loads(text, "tools")
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("digits", [19, 20, 308, 309, 310, 4300, 4301, 5000])
def test_an_integer_is_exact_or_refused_however_long(digits: int) -> None:
    text = '{"a": 1' + "0" * (digits - 1) + "}"
    if digits <= 309:
        assert parsed(text) == {"a": 10 ** (digits - 1)}
        return
    with pytest.raises(DataError, match="number is infinity when parsed as double; correct the"):
        parsed(text)


@given(value=a_value)
@settings(deadline=None)
def test_no_key_is_null_and_nothing_else_is_lost(value: Any) -> None:
    def expected(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: expected(inner) for key, inner in item.items() if inner is not None}
        return list(map(expected, item)) if isinstance(item, list) else item

    before = json.dumps(value)
    assert without_nulls(value) == expected(value)
    assert json.dumps(value) == before


@given(value=st.text(max_size=100))
@settings(deadline=None)
def test_a_value_in_a_message_has_at_most_60_characters(value: str) -> None:
    text = show(value)
    assert len(text) <= 60
    assert text == repr(value) or repr(value).startswith(text.removesuffix("..."))
