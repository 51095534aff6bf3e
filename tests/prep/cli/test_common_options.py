"""Every command has the same options for the log, and the same ends: a line and an exit code."""

import logging

import click
import pytest
from click.testing import CliRunner, Result

from prep.cli.common_options import logging_options, reporting
from shared.errors import DataError, SftError

ENDS: dict[str, BaseException | None] = {
    "well": None,
    "error": DataError("row 3 is bad"),
    "ctrl-c": KeyboardInterrupt(),
    "bug": ZeroDivisionError("a bug"),
}


@click.command()
@click.argument("end")
@click.option("--times", default=1)
@logging_options
def work(*, end: str, times: int) -> None:
    """Do the work."""
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logging.getLogger("prep.work").log(level, logging.getLevelName(level))
    error = ENDS[end]
    if error is not None:
        raise error
    click.echo("done " * times)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(work, arguments)


@pytest.mark.parametrize(
    ("option", "levels"),
    [
        ((), ["INFO", "WARNING"]),
        (("-q",), ["WARNING"]),
        (("-v",), ["DEBUG", "INFO", "WARNING"]),
        (("--quiet",), ["WARNING"]),
        (("--verbose",), ["DEBUG", "INFO", "WARNING"]),
    ],
)
def test_the_options_decide_what_is_logged(option: tuple[str, ...], levels: list[str]) -> None:
    result = run("well", "--times", "2", *option)
    assert (result.exit_code, result.stdout.split()) == (0, ["done", "done"])
    assert [line.split()[-1] for line in result.stderr.splitlines()] == levels


def test_an_error_is_one_line_and_its_traceback_comes_with_verbose() -> None:
    result = run("error", "-q")
    assert result.exit_code == DataError.exit_code
    assert result.stderr.splitlines()[1:] == ["error: row 3 is bad"]
    assert "Traceback" in run("error", "-v").stderr


def test_ctrl_c_tells_how_to_resume() -> None:
    result = run("ctrl-c", "-q")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[1:] == ["interrupted; run the same command again to resume"]


def test_a_bug_keeps_its_traceback() -> None:
    assert run("bug").exception is ENDS["bug"]


def test_the_help_is_that_of_the_command() -> None:
    output = run("--help").output
    assert "Do the work." in output
    for option in ("--times", "-v, --verbose", "-q, --quiet"):
        assert option in output


def test_a_block_reports_without_options() -> None:
    with pytest.raises(SystemExit) as caught, reporting():
        raise SftError("no")
    assert caught.value.code == 1
