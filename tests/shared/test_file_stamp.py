"""A mapped file that is no longer the one that was opened is found without reading it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import ArtifactError
from shared.file_stamp import stamp


def _truncate(path: Path) -> None:
    os.truncate(path, 3)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def _write(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"X")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_truncate, "it has 3 bytes, it had 10 when it was opened"),
        (_grow, "it has 14 bytes, it had 10 when it was opened"),
        (_replace, "another file has its name"),
        (_write, "it was written to"),
        (_remove, "it cannot be found any more"),
    ],
)
def test_every_change_is_named_with_the_file(
    change: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.npy"
    path.write_bytes(b"0123456789")
    with path.open("rb") as opened:
        file_stamp = stamp(path, opened)
    file_stamp.check()
    change(path)
    with pytest.raises(ArtifactError, match=f"{path} was changed while it was in use: {reason}"):
        file_stamp.check()


def test_the_stamp_is_that_of_the_open_file_not_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    path.write_bytes(b"0123456789")
    with path.open("rb") as opened:
        _replace(path)
        file_stamp = stamp(path, opened)
    with pytest.raises(ArtifactError, match="another file has its name"):
        file_stamp.check()


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    path.write_bytes(b"0123456789")
    with path.open("rb") as opened:
        file_stamp = stamp(path, opened)
        opened.read()
    os.utime(path, ns=(1, path.stat().st_mtime_ns))  # the time of access
    file_stamp.check()
