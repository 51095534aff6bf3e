"""What push and pull are asked on the command line reaches them, defaults included."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from prep.cli.main import cli
from prep.sharing.pull import PullOptions
from prep.sharing.push import PushOptions

DEFAULTS: dict[str, Any] = {"revision": None, "replace": False, "workers": 4}
GIVEN = ("--revision", "v2", "--replace", "--workers", "7")
CHANGED: dict[str, Any] = {"revision": "v2", "replace": True, "workers": 7}


def calls_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []

    def record(*arguments: object) -> list[str]:
        calls.append(arguments)
        return ["first line", "second line"]

    monkeypatch.setattr(f"prep.sharing.{name}.{name}", record)
    return calls


def invoke(*arguments: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert (result.exit_code, result.output) == (0, "first line\nsecond line\n"), result.exception


def test_push_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of("push", monkeypatch)
    invoke("push", "set", "user/name")
    invoke("push", "set", "user/name", "--public", *GIVEN)
    invoke("push", "--private", "set", "user/name")
    private = (Path("set"), "user/name", PushOptions(public=False, **DEFAULTS))
    assert calls == [
        private,
        (Path("set"), "user/name", PushOptions(public=True, **CHANGED)),
        private,
    ]


def test_pull_gets_its_options_and_may_go_without_a_destination(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = calls_of("pull", monkeypatch)
    invoke("pull", "user/name")
    invoke("pull", "user/name", "out", *GIVEN)
    assert calls == [
        ("user/name", None, PullOptions(**DEFAULTS)),
        ("user/name", Path("out"), PullOptions(**CHANGED)),
    ]


@pytest.mark.parametrize(
    "arguments", [["push", "set"], ["pull"], ["pull", "a/b", "--workers", "0"]]
)
def test_what_is_missing_or_out_of_range_is_a_usage_error(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, arguments).exit_code == 2
