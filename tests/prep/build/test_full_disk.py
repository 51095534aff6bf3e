"""A disk that is full or read-only ends a build with one line; nothing is lost, and it resumes when
there is space."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prep_builds import write_toml
from prep_processes import Ended, ForkedPrep, PrepCase, leftovers, manifest_bytes, start

from shared.shard_reader import check_hashes

CHUNK_LINES = 400


@pytest.fixture(scope="module")
def case(forked: ForkedPrep, tmp_path_factory: pytest.TempPathFactory) -> PrepCase:
    case = PrepCase(tmp_path_factory.mktemp("case"), (4000, 100))
    case.build(forked)
    return case


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB: two or three chunks fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if mount("-t", "tmpfs", "-o", "size=512k", "tmpfs", disk):
        pytest.skip("a full disk needs the right to mount a small file system (root)")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def mount(*arguments: object) -> int:
    try:
        return subprocess.run(
            ["mount", *map(str, arguments)], capture_output=True, check=False
        ).returncode
    except FileNotFoundError:
        return -1


def check_one_line(ended: Ended, *expected: str) -> None:
    assert ended.code == 6, ended.output
    assert "Traceback" not in ended.output
    (line,) = [line for line in ended.output.splitlines() if "error: " in line]
    assert all(words in line for words in expected), line


def test_a_disk_that_fills_up_while_tokenising_keeps_what_is_committed(
    case: PrepCase, forked: ForkedPrep, disk: Path, tmp_path: Path
) -> None:
    arguments = case.arguments(tmp_path, store=disk / "store")
    ended = forked.run(arguments, chunk_lines=CHUNK_LINES)
    check_one_line(
        ended,
        f"{disk / 'store'}: No space left on device; free some space",
        "run the same command again",
    )
    committed = {path: path.stat().st_ino for path in disk.glob("store/*/chunk-*")}
    assert committed
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "out").exists()
    assert mount("-o", "remount,size=64m", disk) == 0
    ended = forked.run(arguments, chunk_lines=CHUNK_LINES)
    assert ended.code == 0, ended.output
    assert {
        path: path.stat().st_ino for path in disk.glob("store/*/chunk-*")
    }.items() >= committed.items()
    assert manifest_bytes(tmp_path) == manifest_bytes(case.folder)


def test_a_disk_that_fills_up_under_a_worker_process_is_the_same_one_line(
    case: PrepCase, disk: Path
) -> None:
    process = start(case.arguments(disk, workers=2))
    output, errors = process.communicate(timeout=120)
    ended = Ended(process.returncode, output + errors, -1, 0)
    check_one_line(ended, f"{disk / 'store'}: No space left on device")
    assert leftovers(disk) == []


def test_a_disk_that_fills_up_while_writing_leaves_the_old_set(
    case: PrepCase, forked: ForkedPrep, disk: Path, tmp_path: Path
) -> None:
    few = write_toml(
        tmp_path / "few.toml", {**case.tables, "sources": [{**case.tables["sources"][1]}]}
    )
    assert forked.run(case.arguments(disk, store=case.folder / "store", file=few)).code == 0
    before = manifest_bytes(disk)
    arguments = [*case.arguments(disk, store=case.folder / "store"), "--rebuild"]
    check_one_line(forked.run(arguments), f"{disk / 'out'}: No space left on device")
    assert manifest_bytes(disk) == before
    check_hashes(disk / "out")
    assert leftovers(disk) == []
    assert mount("-o", "remount,size=64m", disk) == 0
    assert forked.run(arguments).code == 0
    assert manifest_bytes(disk) == manifest_bytes(case.folder)


def test_a_read_only_directory_for_the_set_is_reported_in_one_line(
    case: PrepCase, forked: ForkedPrep, disk: Path
) -> None:
    assert mount("-o", "remount,ro", disk) == 0
    check_one_line(
        forked.run(case.arguments(disk)), f"{disk}", "Read-only file system; make it writable"
    )


def test_a_read_only_directory_for_the_samples_is_reported_in_one_line(
    case: PrepCase, forked: ForkedPrep, disk: Path, tmp_path: Path
) -> None:
    assert mount("-o", "remount,ro", disk) == 0
    ended = forked.run(case.arguments(tmp_path, store=disk / "store"))
    check_one_line(ended, f"{disk / 'store'}", "Read-only file system")
    assert not (tmp_path / "out").exists()
