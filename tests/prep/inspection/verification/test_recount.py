"""No value of a manifest can be changed unnoticed: all are sealed, most follow from the files."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows

from prep.inspection.verification.verify import verify
from shared.errors import SftError
from shared.hashing import canonical_json, digest
from shared.shard_format import FORMAT_VERSION
from shared.shard_reader import open_shard_set

Key = tuple[str | int, ...]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    rows = write_rows(
        folder / "rows.jsonl", [chat(f"What is {n}?", f"It is {n}.") for n in range(12)] + ["{}"]
    )
    more = write_rows(
        folder / "more.jsonl",
        [chat("Hello there!", "Hello " * n, system="Sys") for n in range(1, 9)],
    )
    tables = mixture_of(
        [rows, more], small_tokenizer(folder / "tokenizer"), eval={"fraction": 0.4},
        rows={"on_error": "skip", "reject_budget": 0.5},
    )  # fmt: skip
    build_set(tables, folder / "set")
    return folder / "set"


def leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, dict | list) and value:
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*key, name))
    else:
        yield key, value


def changed(data: Any, key: Key, value: Any) -> Any:
    result = copy.deepcopy(data)
    inner = result
    for name in key[:-1]:
        inner = inner[name]
    inner[key[-1]] = value
    return result


def without(data: Any, key: Key) -> Any:
    result = copy.deepcopy(data)
    inner = result
    for name in key[:-1]:
        inner = inner[name]
    del inner[key[-1]]
    return result


def edits(data: Any) -> Iterator[tuple[Key, Any]]:
    for key, value in leaves(data):
        for other in (None, True, -1, 10**30, 1e300, "other", [], {}, [value], {"a": value}):
            if canonical_json(other) != canonical_json(value):
                yield key, changed(data, key, other)
        yield key, without(data, key)
        yield key, changed(data, (*key[:-1], "added" if isinstance(key[-1], str) else key[-1]), [0])


def another(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return "f" * 64 if len(value) == 64 else value + "x"
    return "something" if value is None else [7] if isinstance(value, list) else {"something": 1}


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "set"))


@pytest.mark.parametrize("name", ["manifest.json", "eval/manifest.json"])
def test_every_edit_of_every_leaf_is_refused_by_verify(name: str, copied: Path) -> None:
    assert any("follow from the files" in line for line in verify(copied))
    file = copied / name
    where = file.parent  # verify comes to the eval set in the end; its own answer is quicker
    data = json.loads(file.read_bytes())
    accepted, number = [], 0
    for key, edit in edits(data):
        file.write_bytes(canonical_json(edit))
        number += 1
        try:
            verify(where)
            accepted.append(key)
        except SftError:
            pass
    assert number > 1000
    assert accepted == []
    with pytest.raises(SftError):
        verify(copied)
    with pytest.raises(SftError):
        open_shard_set(where)


# These follow from nothing in the set's files: the seal alone guards them. (`inputs_digest` follows
# `inputs`.)
SEALED_ONLY = {
    "chat_template.split_markers",
    "inputs.code", "inputs.sources", "inputs.tokenizer", "inputs.versions", "inputs.questions",
    "sources.content_sha256", "sources.details", "sources.hub_id", "sources.revision",
    "sources.rows_read", "sources.rows_truncated", "sources.rows_without_terminator",
}  # fmt: skip


def spelled(key: Key) -> str:
    return ".".join(str(name) for name in key if isinstance(name, str))


def test_what_only_the_seal_guards_is_listed_here(copied: Path) -> None:
    file = copied / "manifest.json"
    data = json.loads(file.read_bytes())
    undetected = set()
    for key, value in leaves(data):
        if key == ("seal",):
            continue
        edit = without(changed(data, key, another(value)), ("seal",))
        edit["inputs_digest"] = (
            digest(edit["inputs"]) if key[0] == "inputs" else edit["inputs_digest"]
        )
        file.write_bytes(canonical_json({**edit, "seal": digest(edit)}))
        try:
            verify(copied)
        except SftError:
            continue
        undetected.add(".".join(spelled(key).split(".")[:2]))
    assert undetected == SEALED_ONLY


def test_samples_do_not_depend_on_the_format_version(built: Path) -> None:
    for file in (built.parent / "samples").glob("*/inputs.json"):
        assert "format_version" not in json.loads(file.read_bytes())
    assert json.loads((built / "manifest.json").read_bytes())["format_version"] == FORMAT_VERSION
