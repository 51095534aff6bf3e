"""Whole or absent: after a kill, a full disk or an exception there is the old artefact or the new
one, never a mix."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import atomic
from shared.errors import ArtifactError

KILL = "lambda *a: os.kill(os.getpid(), signal.SIGKILL)"


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    prelude = "import os, signal, sys\nfrom pathlib import Path\nfrom shared import atomic\n"
    command = [sys.executable, "-c", prelude + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def python_that_says_ready(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    prelude = "import os, signal, sys, time\nfrom pathlib import Path\nfrom shared import atomic\n"
    command = [sys.executable, "-c", prelude + code, *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def build(final: Path, files: dict[str, bytes], error: type[BaseException] | None = None) -> None:
    with atomic.staged_dir(final) as staged:
        for name, data in files.items():
            (staged / name).write_bytes(data)
        if error:
            raise error


def make_dir(path: Path, data: bytes) -> Path:
    path.mkdir()
    (path / "file").write_bytes(data)
    return path


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


# --- files


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    atomic.write_bytes(path, b"old")
    atomic.write_bytes(path, b"new")
    assert tree(tmp_path) == {"deep/file": b"new"}


def test_json_is_written_canonically(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "file", {"b": 1, "a": []})
    assert (tmp_path / "file").read_bytes() == b'{\n  "a": [],\n  "b": 1\n}\n'


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path, call: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = run_python(
        f"os.{call} = {KILL}\natomic.write_bytes(Path(sys.argv[1]), b'new' * 100000)", path
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    atomic.remove_leftovers(tmp_path, "file")
    assert tree(tmp_path) == {"file": b"old"}


def test_a_kill_after_the_rename_leaves_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = run_python(
        f"atomic.fsync_dir = {KILL}\natomic.write_bytes(Path(sys.argv[1]), b'new')", path
    )
    assert done.returncode == -signal.SIGKILL
    assert tree(tmp_path) == {"file": b"new"}


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "file", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "file", float("nan"))
    assert tree(tmp_path) == {"file": b"1\n"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("a full disk needs the mount command")
    if mounted.returncode:
        pytest.skip("a full disk needs the right to mount a small file system (root)")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_old_file(small_disk: Path) -> None:
    atomic.write_bytes(small_disk / "file", b"old")
    with pytest.raises(OSError, match="No space left"):
        atomic.write_bytes(small_disk / "file", bytes(1 << 20))
    assert tree(small_disk) == {"file": b"old"}


def test_a_full_disk_leaves_no_half_directory(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        build(small_disk / "set", {"first": b"1", "second": bytes(1 << 20)})
    assert list(small_disk.iterdir()) == []


# --- directories


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "sets" / "demo"
    with atomic.staged_dir(final) as staged:
        assert list(staged.iterdir()) == []
        (staged / "sub").mkdir()
        (staged / "sub" / "file").write_bytes(b"x")
        assert not final.exists()
    assert tree(tmp_path) == {"sets/demo/sub/file": b"x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_directory_is_removed_on_any_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        build(tmp_path / "demo", {"file": b"x"}, error)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_never_replaced_by_a_staged_one(tmp_path: Path) -> None:
    make_dir(tmp_path / "demo", b"theirs")
    with pytest.raises(ArtifactError, match="appeared while it was being built"):
        build(tmp_path / "demo", {"file": b"mine"})
    assert tree(tmp_path) == {"demo/file": b"theirs"}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_kill_before_the_rename_leaves_no_directory(tmp_path: Path, call: str) -> None:
    code = f"""
with atomic.staged_dir(Path(sys.argv[1])) as staged:
    (staged / "file").write_bytes(b"x")
    os.{call} = {KILL}
"""
    assert run_python(code, tmp_path / "demo").returncode == -signal.SIGKILL
    assert not (tmp_path / "demo").exists()
    atomic.remove_leftovers(tmp_path, "demo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [None, b"old"])
def test_replace_dir_puts_the_new_one_in_place(tmp_path: Path, old: bytes | None) -> None:
    if old is not None:
        make_dir(tmp_path / "demo", old)
    atomic.replace_dir(make_dir(tmp_path / "staged", b"new"), tmp_path / "demo")
    assert tree(tmp_path) == {"demo/file": b"new"}


def test_replace_dir_that_fails_puts_the_old_one_back(tmp_path: Path) -> None:
    make_dir(tmp_path / "demo", b"old")
    with pytest.raises(FileNotFoundError):
        atomic.replace_dir(tmp_path / "absent", tmp_path / "demo")
    assert tree(tmp_path) == {"demo/file": b"old"}


def test_leftovers_of_one_name_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    for name in (".tmp-a-12", ".tmp-a-12-old", ".tmp-a-b-12", ".tmp-ab-12", "a"):
        make_dir(tmp_path / name, b"")
    (tmp_path / ".tmp-a-13").write_bytes(b"a file")
    atomic.remove_leftovers(tmp_path, "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-a-b-12", ".tmp-ab-12", "a"]
    atomic.remove_leftovers(tmp_path, ".*")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- the lock


def take(lock: Path) -> None:
    with atomic.exclusive_lock(lock, "building demo"):
        pass


HOLD = """
with atomic.exclusive_lock(Path(sys.argv[1]), "building demo"):
    print("held", flush=True)
    time.sleep(60)
"""
HOLD_WITH_WORKER = """
with atomic.exclusive_lock(Path(sys.argv[1]), "building demo"):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_kept_out_and_a_kill_frees_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "deep" / "lock"
    with python_that_says_ready(HOLD, lock) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match=f"another process is building demo .*{lock}"):
            take(lock)
        holder.kill()
        holder.wait()
        take(lock)


def test_the_orphaned_worker_of_a_killed_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with python_that_says_ready(HOLD_WITH_WORKER, lock) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        try:
            holder.kill()
            holder.wait()
            os.kill(worker, 0)  # it lives
            take(lock)
        finally:
            os.kill(worker, signal.SIGKILL)


def test_the_lock_is_free_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with contextlib.suppress(ValueError), atomic.exclusive_lock(lock, "testing"):
        raise ValueError
    done = run_python("with atomic.exclusive_lock(Path(sys.argv[1]), 'x'): print('got it')", lock)
    assert done.stdout == "got it\n"
