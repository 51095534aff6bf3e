"""The commands on a finished run call what they are for, with the options that were given."""

import json
from pathlib import Path
from typing import Any

import pytest
from train_runs import train_here

from train.publish.export import WeightFiles


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of the functions behind the commands: name, arguments, options."""
    recorded: list[tuple[Any, ...]] = []

    def replace(name: str, result: object) -> None:
        def record(*arguments: object, **options: object) -> object:
            recorded.append((name.rpartition(".")[2], arguments, options))
            return result

        monkeypatch.setattr(name, record)

    replace("train.publish.export.export_checkpoint", None)
    replace("train.publish.checkpoints.push_checkpoint", "address of one")
    replace("train.publish.checkpoints.push_checkpoints", ["first address", "second address"])
    replace("train.publish.hub.push_model", "address of the model")
    replace("train.results.plot.plot_runs", None)
    replace("train.results.ask.ask", ["a line"])
    replace("train.results.which.which", ["a row"])
    return recorded


def test_export_prints_where_the_model_is(calls: list[tuple[Any, ...]]) -> None:
    assert train_here("export", "c", "m").output == "m\n"
    train_here("export", "c", "m", "--dtype", "bf16", "--max-file-size", "500MB")
    assert calls == [
        ("export_checkpoint", (Path("c"), Path("m"), WeightFiles()), {}),
        (
            "export_checkpoint",
            (Path("c"), Path("m"), WeightFiles(dtype="bf16", max_file_size="500MB")),
            {},
        ),
    ]


def test_push_takes_a_model_a_checkpoint_or_all_checkpoints(
    calls: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    assert train_here("push", tmp_path, "a/b").output == "address of the model\n"
    assert train_here("push", tmp_path, "a/b", "--checkpoints").output == (
        "first address\nsecond address\n"
    )
    (tmp_path / "state.json").write_text("{}")
    assert train_here("push", tmp_path, "a/b").output == "address of one\n"
    assert [name for name, _, _ in calls] == ["push_model", "push_checkpoints", "push_checkpoint"]
    assert calls[0][1] == calls[2][1] == (tmp_path, "a/b")
    assert (calls[1][1][0].path, calls[1][1][1]) == (tmp_path, "a/b")


def test_a_plot_lies_in_the_first_run_unless_out_is_given(calls: list[tuple[Any, ...]]) -> None:
    assert train_here("plot", "a", "b").output == "a/loss.png\n"
    assert train_here("plot", "a", "--out", "x.png").output == "x.png\n"
    assert [arguments for _, arguments, _ in calls] == [
        ([Path("a"), Path("b")], Path("a/loss.png")),
        ([Path("a")], Path("x.png")),
    ]


def test_ask_and_which_get_their_options(calls: list[tuple[Any, ...]]) -> None:
    assert train_here("ask", "m", "--prompt", "p", "--prompt", "q").output == "a line\n"
    assert train_here("which", "r", "--step", 3, "--rank", 1, "--full").output == "a row\n"
    assert calls == [
        (
            "ask",
            (Path("m"),),
            {"prompts": ("p", "q"), "questions": None, "show": 3, "max_new_tokens": 64},
        ),
        (
            "which",
            (Path("r"),),
            {
                "step": 3,
                "rank": 1,
                "shards": None,
                "as_json": False,
                "full": True,
                "colour": False,
            },
        ),
    ]


@pytest.mark.parametrize(("state", "code"), [("failed", 5), ("stopped", 75), ("failed", 3)])
def test_status_exits_as_the_run_did(state: str, code: int, tmp_path: Path) -> None:
    status = {"state": state, "exit_code": code, "message": "why it ended", "step": 4}
    (tmp_path / "status.json").write_text(json.dumps(status))
    result = train_here("status", tmp_path)
    assert result.exit_code == code
    assert "why it ended" in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_status_of_a_directory_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    assert train_here("status", tmp_path).exit_code == 5
