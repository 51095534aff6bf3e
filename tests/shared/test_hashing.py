"""Canonical JSON and digests are part of the format: these values never change within a format
version."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import hashing

PATIENT = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # a busy machine is no failure
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=20,
)


def test_canonical_json_is_spelled_in_one_way() -> None:
    value = {"b": [1, 2.5, True, None], "a": {"\u00e9": 'q"\\\n\x01\x7f/'}, "empty": {}, "list": []}
    assert (
        hashing.canonical_json(value)
        == (
            '{\n  "a": {\n    "\u00e9": "q\\"\\\\\\n\\u0001\x7f/"\n  },\n  "b": [\n    1,\n   '
            ' 2.5,\n    true,\n    null\n  ],\n  "empty": {},\n  "list": []\n}\n'
        ).encode()
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"),
        (
            {"b": 1, "a": "\u00e9"},
            "d5921d791b259217641658069ce48ea901e0b626c8a0fa7c0c6e733fb1bc64b4",
        ),
        (
            [1, 1.0, "1", None, True],
            "a758dd2cbb32cb3efceb5311bbf001aaa2938fab9ef808c987dd8fad879dc92c",
        ),
    ],
)
def test_digests_are_golden(value: object, expected: str) -> None:
    assert hashing.digest(value) == expected


@PATIENT
@given(JSON_VALUES)
def test_canonical_json_reads_back_as_the_value(value: object) -> None:
    assert json.loads(hashing.canonical_json(value)) == value


@PATIENT
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers()))
def test_the_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    assert hashing.digest(value) == hashing.digest(dict(reversed(value.items())))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_what_json_has_no_word_for_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        hashing.canonical_json(value)


def test_a_file_is_hashed_like_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000  # more than one block
    (tmp_path / "file").write_bytes(data)
    assert (
        hashing.sha256_file(tmp_path / "file")
        == hashing.sha256_bytes(data)
        == hashlib.sha256(data).hexdigest()
    )


def test_a_seed_depends_on_every_part_and_their_order() -> None:
    seeds = {
        hashing.seed_from("pack", 0, 1),
        hashing.seed_from("pack", 1, 0),
        hashing.seed_from("pack", "0", 1),
    }
    assert len(seeds) == 3
    assert hashing.seed_from("pack", 0, 1) == 6622276185457472860


def test_a_seed_is_the_same_in_another_process() -> None:
    code = "from shared import hashing; print(hashing.seed_from('pack', 0, 1))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == hashing.seed_from("pack", 0, 1)
