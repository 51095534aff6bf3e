"""A full or read-only disk is an error that names a directory and a remedy; other errors pass."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from shared.disk import is_full, library_writing_to, unwritable, writing_to
from shared.errors import ChecksumError, PrerequisiteError

PLACE = Path("/runs/mine")
NAMED = "/runs/mine/model.bin"


@pytest.mark.parametrize(
    ("number", "file", "where", "remedy"),
    [
        (errno.ENOSPC, NAMED, "/runs/mine", "free some space"),
        (errno.EDQUOT, NAMED, "/runs/mine", "free some of your quota"),
        (errno.EACCES, NAMED, NAMED, "change its permissions"),
        (errno.EPERM, NAMED, NAMED, "change its permissions"),
        (errno.EROFS, NAMED, NAMED, "make it writable"),
        (errno.EACCES, None, "/runs/mine", "change its permissions"),
    ],
)
def test_lack_of_space_names_the_directory_and_lack_of_permission_the_file(
    number: int, file: str | None, where: str, remedy: str
) -> None:
    error = OSError(number, "as the system says", file)
    with pytest.raises(PrerequisiteError) as caught, writing_to(PLACE):
        raise error
    assert str(caught.value).startswith(f"{where}: {os.strerror(number)}; {remedy}, or choose ")
    assert caught.value.__cause__ is error
    assert is_full(error) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_without_a_name_the_message_begins_with_the_reason() -> None:
    assert str(unwritable(OSError(errno.ENOSPC, "full"))).startswith(
        "No space left on device; free"
    )


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), ChecksumError("ours"), ValueError("a bug")]
)
def test_any_other_error_passes_as_it_is(error: Exception, tmp_path: Path) -> None:
    for context in (writing_to(tmp_path), library_writing_to(tmp_path)):
        with pytest.raises(type(error)) as caught, context:
            raise error
        assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_hides_a_full_disk_is_seen_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, data: bytes) -> int:
            assert len(data) >= 1 << 20, "a few bytes may still fit"
            raise OSError(errno.ENOSPC, "No space left on device")

    def temporary_file(*, dir: Path) -> Any:  # noqa: A002 (the parameter of tempfile)
        assert dir == tmp_path
        return Full()

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary_file)
    with (
        pytest.raises(PrerequisiteError, match=f"{tmp_path}: No space left"),
        library_writing_to(tmp_path),
    ):
        raise RuntimeError("I/O error: bad zip entry")
