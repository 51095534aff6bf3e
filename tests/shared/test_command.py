"""An error that a user can act on becomes one line and its exit code; anything else is a bug and
stays one."""

import errno

import pytest

from shared import errors
from shared.command import reporting_errors


def fail(error: BaseException, *, verbosity: int = 0, rank: int = 0) -> None:
    with reporting_errors(verbosity, rank=rank):
        raise error


@pytest.mark.parametrize("error", errors.SftError.__subclasses__())
def test_every_error_of_ours_ends_with_its_code(error: type[errors.SftError]) -> None:
    with pytest.raises(SystemExit) as caught:
        fail(error("what happened"))
    assert caught.value.code == error.exit_code


def test_the_message_is_one_line_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(errors.DataError("row 3:\n  a broken\n  row"))
    assert capsys.readouterr() == ("", "error: row 3: a broken row\n")


def test_the_traceback_comes_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(errors.ConfigError("bad key"), verbosity=1)
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: bad key\n")


def test_other_ranks_say_who_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(errors.ArtifactError("torn"), rank=2)
    assert capsys.readouterr().err == "rank 2: error: torn\n"


def test_a_requested_stop_is_no_error_and_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        with pytest.raises(SystemExit) as caught:
            fail(errors.StoppedOnRequest("saved step 5"), rank=rank)
        assert caught.value.code == 75
    assert capsys.readouterr().err == "saved step 5\n"


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()])
def test_what_is_not_ours_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail(error)


def test_an_error_of_space_or_permission_names_the_file_and_the_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        fail(PermissionError(errno.EACCES, "Permission denied", "/data/rows.jsonl"))
    assert caught.value.code == 6
    assert (
        capsys.readouterr().err
        == "error: /data/rows.jsonl: Permission denied; change its permissions, or choose another"
        " directory, and run the same command again: what was finished is kept\n"
    )


def test_other_errors_of_the_system_keep_their_traceback() -> None:
    with pytest.raises(OSError, match="Input/output error"):
        fail(OSError(errno.EIO, "Input/output error"))
