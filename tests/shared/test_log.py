"""Logs go to stderr and nowhere else, at the level that was asked for, and follow a redirected
stderr."""

import logging
from collections.abc import Iterator

import pytest

from shared import log


@pytest.fixture(autouse=True)
def untouched_loggers() -> Iterator[None]:
    names = ("prep", "train", "shared")
    before = {
        name: (list(logging.getLogger(name).handlers), logging.getLogger(name).level)
        for name in names
    }
    yield
    for name, (handlers, level) in before.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).propagate = True


@pytest.mark.parametrize(
    ("verbosity", "rank", "shown"),
    [
        (-1, None, ["warning"]),
        (0, None, ["info", "warning"]),
        (0, 0, ["info", "warning"]),
        (1, None, ["debug", "info", "warning"]),
        (3, None, ["debug", "info", "warning"]),
        (0, 1, ["warning"]),
        (1, 1, ["warning"]),
    ],
)
def test_the_level_decides_what_is_shown(
    verbosity: int, rank: int | None, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure(verbosity, rank=rank)
    logger = logging.getLogger("prep.somewhere")
    for level in ("debug", "info", "warning"):
        logger.log(logging.getLevelNamesMapping()[level.upper()], "it is %s", level)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split("it is ")[1] for line in err.splitlines()] == shown
    assert all(("[rank " in line) == (rank is not None) for line in err.splitlines())


def test_configuring_twice_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(0)
    log.configure(0)
    logging.getLogger("train.somewhere").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_other_loggers_and_root_are_left_alone() -> None:
    handlers = list(logging.getLogger().handlers)
    log.configure(1)
    assert logging.getLogger().handlers == handlers
    assert logging.getLogger("somebody.else").propagate
