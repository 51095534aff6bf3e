"""A build that is killed anywhere, by anybody, goes on to the same set; what was there before is
there until then."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from prep_builds import write_toml
from prep_processes import (
    ForkedPrep,
    PrepCase,
    is_alive,
    leftovers,
    manifest_bytes,
    start,
    wait_until,
    workers_of,
)  # fmt: skip

from shared.atomic import exclusive_lock
from shared.shard_reader import check_hashes

CHUNK_LINES = 60  # of forked builds; the installed command makes one chunk of 4096


@pytest.fixture(scope="module")
def small(forked: ForkedPrep, tmp_path_factory: pytest.TempPathFactory) -> PrepCase:
    case = PrepCase(tmp_path_factory.mktemp("case"), (300, 200))
    case.build(forked)
    return case


@pytest.fixture(scope="module")
def large(forked: ForkedPrep, tmp_path_factory: pytest.TempPathFactory) -> PrepCase:
    """Four chunks, for the installed command with two workers."""
    case = PrepCase(tmp_path_factory.mktemp("large"), (13_000, 100))
    case.build(forked)
    return case


def test_how_a_build_is_chunked_does_not_show(
    small: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    ended = forked.run(small.arguments(tmp_path), chunk_lines=CHUNK_LINES)
    assert ended.code == 0, ended.output
    assert len(list((tmp_path / "store").glob("*/chunk-*"))) == 9
    assert manifest_bytes(tmp_path) == manifest_bytes(small.folder)


def moments(name: str) -> list[Any]:
    """Return thirty draws between 0 and 1: the default run takes three of them."""
    draw = random.Random(name)
    marks = [[], [], [], *([pytest.mark.full, pytest.mark.slow] for _ in range(27))]
    return [
        pytest.param(draw.random(), marks=some, id=str(number)) for number, some in enumerate(marks)
    ]


@pytest.fixture(scope="module")
def num_changes(
    small: PrepCase, forked: ForkedPrep, tmp_path_factory: pytest.TempPathFactory
) -> int:
    return forked.run(
        small.arguments(tmp_path_factory.mktemp("counted")), chunk_lines=CHUNK_LINES
    ).changes


@pytest.mark.parametrize("moment", moments("build"))
def test_a_build_killed_at_any_change_resumes_to_the_same_set(
    moment: float, num_changes: int, small: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    ended = forked.run(
        small.arguments(tmp_path), chunk_lines=CHUNK_LINES, at=int(moment * num_changes)
    )
    assert ended.code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    committed = inodes(tmp_path / "store")
    ended = forked.run(small.arguments(tmp_path), chunk_lines=CHUNK_LINES)
    assert ended.code == 0, ended.output
    assert inodes(tmp_path / "store").items() >= committed.items()
    assert manifest_bytes(tmp_path) == manifest_bytes(small.folder)
    check_hashes(tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.fixture(scope="module")
def held_out(
    small: PrepCase, forked: ForkedPrep, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A place with a set and its eval set, and the number of changes that its build makes with the
    samples there."""
    place = tmp_path_factory.mktemp("held_out")
    file = write_toml(place / "held_out.toml", {**small.tables, "eval": {"fraction": 0.2}})
    assert forked.run(small.arguments(place, file=file)).code == 0
    again = small.arguments(place / "counted", file=file, store=place / "store")
    return place, forked.run(again).changes


@pytest.mark.parametrize("moment", moments("held out"))
def test_a_build_killed_at_any_change_leaves_no_set_without_what_it_holds_out(
    moment: float, held_out: tuple[Path, int], small: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    place, changes = held_out
    arguments = small.arguments(tmp_path, file=place / "held_out.toml", store=place / "store")
    assert forked.run(arguments, at=int(moment * changes)).code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert forked.run(arguments).code == 0
    assert leftovers(tmp_path) == []
    for name in ("out", "out/eval"):
        check_hashes(tmp_path / name)
        assert (tmp_path / name / "manifest.json").read_bytes() == (
            place / name / "manifest.json"
        ).read_bytes()


@pytest.fixture(scope="module")
def narrow(
    small: PrepCase, forked: ForkedPrep, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A place with a set of another length, and the number of changes that its rebuild makes."""
    place = tmp_path_factory.mktemp("narrow")
    file = write_toml(place / "narrow.toml", {**small.tables, "max_seq_len": 64})
    counted = shutil.copytree(place, place / "counted")
    for folder in (place, counted):
        assert forked.run(small.arguments(folder, file=file, store=place / "store")).code == 0
    return place, forked.run(
        [*small.arguments(counted, store=place / "store"), "--rebuild"]
    ).changes


@pytest.mark.parametrize("moment", moments("rebuild"))
def test_a_rebuild_killed_at_any_change_leaves_the_old_set_or_the_new_one(
    moment: float, narrow: tuple[Path, int], small: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    old, changes = narrow
    shutil.copytree(old / "out", tmp_path / "out")
    arguments = small.arguments(tmp_path, store=old / "store")
    assert forked.run([*arguments, "--rebuild"], at=int(moment * changes)).code == -signal.SIGKILL
    look = forked.run(
        arguments
    )  # without --rebuild it puts right what the kill left, and writes nothing
    assert look.code in (0, 5)
    assert manifest_bytes(tmp_path) == manifest_bytes(small.folder if look.code == 0 else old)
    check_hashes(tmp_path / "out")
    assert leftovers(tmp_path) == []
    assert forked.run([*arguments, "--rebuild"]).code == 0
    assert manifest_bytes(tmp_path) == manifest_bytes(small.folder)


def test_a_kill_between_the_two_renames_of_a_rebuild_loses_no_set(
    narrow: tuple[Path, int], small: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    old, _ = narrow
    shutil.copytree(old / "out", tmp_path / "out")
    arguments = small.arguments(tmp_path, store=old / "store")
    ended = forked.run([*arguments, "--rebuild"], before_rename_to=tmp_path / "out")
    assert ended.code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    ended = forked.run(arguments)
    assert ended.code == 5
    assert "was made from other inputs: config.max_seq_len: 64 -> 128" in ended.output
    assert manifest_bytes(tmp_path) == manifest_bytes(old)
    check_hashes(tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_directory_of_the_users_beside_the_set_is_left_alone(
    small: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    assert forked.run(small.arguments(tmp_path)).code == 0
    folder = tmp_path / "out.new"
    folder.mkdir()
    (folder / "notes").write_text("mine")
    wide = write_toml(tmp_path / "wide.toml", {**small.tables, "max_seq_len": 256})
    assert forked.run([*small.arguments(tmp_path, file=wide), "--rebuild"]).code == 0
    assert (folder / "notes").read_text() == "mine"


def inodes(store: Path) -> dict[Path, int]:
    """Return what tells a chunk that was kept from one that was made again."""
    return {path: path.stat().st_ino for path in store.glob("*/chunk-*")}


def started(case: PrepCase, place: Path) -> "subprocess.Popen[str]":
    """Start the installed command and return when it has committed its first chunk."""
    process = start(case.arguments(place, workers=2))
    wait_until(lambda: list((place / "store").glob("*/chunk-*")), process)
    return process


def check_goes_on(case: PrepCase, forked: ForkedPrep, place: Path) -> None:
    assert not (place / "out").exists()
    committed = inodes(place / "store")
    assert committed
    ended = forked.run(case.arguments(place))
    assert ended.code == 0, ended.output
    assert manifest_bytes(place) == manifest_bytes(case.folder)
    assert inodes(place / "store").items() >= committed.items()
    assert leftovers(place) == []


def test_workers_end_when_their_parent_alone_is_killed(
    large: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    process = started(large, tmp_path)
    workers = workers_of(process)
    assert workers
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_alive, workers)), seconds=20)
    check_goes_on(large, forked, tmp_path)


def test_a_killed_worker_ends_the_build_with_one_line_and_can_be_resumed(
    large: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    process = started(large, tmp_path)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 6
    assert (
        "a worker process died (killed, or out of memory); run the same command again"
        in errors.splitlines()[-1]
    )
    assert "Traceback" not in errors
    check_goes_on(large, forked, tmp_path)


def test_an_interrupt_ends_a_build_at_once_with_one_line_and_can_be_resumed(
    large: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    process = started(large, tmp_path)
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does at Ctrl-C: workers get it too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in errors
    assert not any(map(is_alive, workers))
    check_goes_on(large, forked, tmp_path)


@pytest.mark.full
@pytest.mark.slow
def test_the_installed_command_killed_at_thirty_moments_resumes_to_the_same_set(
    large: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    began = time.monotonic()
    process = start(large.arguments(tmp_path / "timed", workers=2))
    assert process.wait(timeout=120) == 0
    life = time.monotonic() - began
    draw = random.Random(30)
    kills = 0
    for number in range(30):
        place = tmp_path / str(
            number // 3
        )  # the second and third kill meet what the ones before left
        process = start([*large.arguments(place, workers=2), "--rebuild"])
        time.sleep(draw.random() * life)
        os.killpg(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if (place / "out").exists():
            check_hashes(place / "out")
        if number % 3 == 2:
            ended = forked.run(large.arguments(place))
            assert ended.code == 0, ended.output
            assert manifest_bytes(place) == manifest_bytes(large.folder)
            assert leftovers(place) == []
    assert kills >= 10  # the others had ended: what was there made them short


@pytest.mark.full
@pytest.mark.slow
def test_two_builders_at_once_do_not_meet(
    large: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    process = started(large, tmp_path)
    os.kill(process.pid, signal.SIGSTOP)
    same = forked.run(large.arguments(tmp_path))
    elsewhere = large.arguments(tmp_path)
    elsewhere[elsewhere.index("--out") + 1] = tmp_path / "other"
    other = forked.run(elsewhere)
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert same.code == 5
    assert f"another process is building {tmp_path / 'out'}" in same.output
    assert other.code == 5
    assert "another process is tokenising the same source" in other.output
    assert not (tmp_path / "other").exists()
    assert manifest_bytes(tmp_path) == manifest_bytes(large.folder)


@pytest.mark.parametrize(("is_complete", "code"), [(True, 0), (False, 5)])
def test_a_store_that_another_builder_holds_serves_if_it_is_complete(
    is_complete: bool, code: int, small: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    store = shutil.copytree(small.folder / "store", tmp_path / "store")
    places = [path.parent for path in store.glob("*/complete.json")]
    with contextlib.ExitStack() as locks:
        for place in places:
            locks.enter_context(exclusive_lock(store / f"{place.name}.lock", "holding it"))
            if not is_complete:
                (place / "complete.json").unlink()
        ended = forked.run(small.arguments(tmp_path))
    assert ended.code == code, ended.output
    assert ("another process is tokenising the same source" in ended.output) == (code != 0)
    assert forked.run(small.arguments(tmp_path)).code == 0
    assert manifest_bytes(tmp_path) == manifest_bytes(small.folder)
