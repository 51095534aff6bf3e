"""Resolved sources: identified by content, named after their files, hashed once."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from source_files import LINES, resolve, write_hub_directory

from prep.config import SourceConfig
from prep.sources.resolve import remember, resolve_source
from shared.errors import DataError


@pytest.mark.parametrize(
    ("path", "files", "expected"),
    [
        ("chat.v2.jsonl.gz", ["chat.v2.jsonl.gz"], "chat.v2"),
        ("x/chat.parquet", ["x/chat.parquet"], "chat"),
        ("x/train-*.parquet", ["x/train-0.parquet"], "train"),
        ("mine/*.jsonl", ["mine/a.jsonl"], "mine"),
    ],
)
def test_a_source_is_named_after_its_stem(
    path: str, files: list[str], expected: str, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    assert resolve(path, tmp_path).name == expected
    assert resolve(path, tmp_path, name="own").name == "own"


def test_the_identity_is_the_content_and_not_the_path(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.jsonl").write_bytes(LINES)
    one, two = (resolve(f"{folder}/*.jsonl", tmp_path) for folder in ("one", "two"))
    assert one.identity() == two.identity()
    (tmp_path / "two" / "two.jsonl").write_bytes(LINES.replace(b"Hi", b"hi", 1))
    assert one.identity() != resolve("two/*.jsonl", tmp_path).identity()


def test_the_identity_depends_on_where_one_file_ends(tmp_path: Path) -> None:
    for folder, cut in (("one", 10), ("two", 11)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(LINES[:cut])
        (tmp_path / folder / "b.jsonl").write_bytes(LINES[cut:])
    assert resolve("one/*", tmp_path).identity() != resolve("two/*", tmp_path).identity()


def test_a_remembered_file_is_not_hashed_again_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    known = json.loads(json.dumps(remember([resolve("a.jsonl", tmp_path)])))
    known[str(path)][-1] = "remembered"
    config = SourceConfig(path="a.jsonl")
    assert resolve_source(config, tmp_path, known).files[0].sha256 == "remembered"
    assert resolve_source(config, tmp_path, {}).files[0].sha256 != "remembered"
    before = path.stat()
    path.write_bytes(LINES.replace(b"Hi", b"hi", 1))
    # same size, same inode, modification time set back
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert resolve_source(config, tmp_path, known).files[0].sha256 != "remembered"


@pytest.mark.parametrize("memory", [None, 3, "x", [], ["x"], {}, [1, 2, 3, 4, "x"]])
def test_a_memory_of_another_shape_is_ignored(memory: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    known = {str(tmp_path / "a.jsonl"): memory}
    source = resolve_source(SourceConfig(path="a.jsonl"), tmp_path, known)
    assert source == resolve("a.jsonl", tmp_path)


def test_a_hub_directory_is_identified_by_its_split_and_readme(tmp_path: Path) -> None:
    write_hub_directory(tmp_path / "one")
    write_hub_directory(tmp_path / "two")
    one = resolve("one", tmp_path)
    assert one.name == "one"
    assert one.identity() == resolve("two", tmp_path).identity()
    assert one.identity() != resolve("one", tmp_path, split="test").identity()
    assert [file.name for file in one.files] == [
        "README.md",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]


def test_a_missing_split_is_named_with_those_that_exist(tmp_path: Path) -> None:
    write_hub_directory(tmp_path / "hub")
    with pytest.raises(DataError, match="no split 'validation'; it has train, test"):
        resolve("hub", tmp_path, split="validation")


def test_a_full_hub_commit_needs_no_network_and_that_of_a_branch_is_remembered(
    tmp_path: Path,
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    pinned = resolve("org/chats", tmp_path, revision=commit)
    assert (pinned.name, pinned.hub_id, pinned.revision, pinned.files) == (
        "org/chats",
        "org/chats",
        commit,
        (),
    )
    assert pinned.identity() == {"hub_id": "org/chats", "revision": commit, "split": "train"}
    config = SourceConfig(path="org/chats", revision="main")
    moving = resolve_source(config, tmp_path, {"hub:org/chats@main": commit})
    assert moving.revision == commit
    assert remember([moving]) == {"hub:org/chats@main": commit}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing.jsonl", "no file 'missing.jsonl'"),
        ("./org/chats", "no file './org/chats'"),
        ("a/b/c", "no file 'a/b/c'"),
        ("*.jsonl", "no file matches '*.jsonl'"),
        ("notes.txt", "unknown format; expected .jsonl"),
        ("rows.parquet.gz", "unknown format; expected .jsonl"),
        ("empty_directory", "cannot be read as a data set"),
    ],
)
def test_a_source_that_does_not_exist_is_named(path: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"x")
    (tmp_path / "rows.parquet.gz").write_bytes(b"x")
    (tmp_path / "empty_directory").mkdir()
    with pytest.raises(DataError) as caught:
        resolve(path, tmp_path)
    assert expected in str(caught.value)
