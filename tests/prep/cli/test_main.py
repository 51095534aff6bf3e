"""The command sft-prep: light to start, and bad input of every kind is one clear line with its exit
code."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows, write_toml

from prep.cli.main import cli

COMMANDS = sorted(cli.commands)
SFT_PREP = Path(sys.executable).parent / "sft-prep"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture
def tables(tokenizer: Path, tmp_path: Path) -> dict[str, Any]:
    return mixture_of(
        [write_rows(tmp_path / "rows.jsonl", [chat("Hi", "Yo"), chat("a", "b")])], tokenizer
    )


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["group", *COMMANDS])
def test_help_imports_click_and_the_standard_library_only(command: list[str]) -> None:
    script = (
        "import sys\nbefore = set(sys.modules)\nfrom prep.cli.main import main\n"
        f"sys.argv = ['sft-prep', *{command!r}, '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "found = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(found - set(sys.stdlib_module_names) - {'click', 'prep', 'shared'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_shows_a_runnable_example() -> None:
    for name in COMMANDS:
        assert f"sft-prep {name}" in CliRunner().invoke(cli, [name, "--help"]).output


def malformed_json(tables: dict[str, Any], folder: Path) -> str:
    write_rows(folder / "rows.jsonl", [chat("a", "b"), '{"messages": [}'])
    return "rows.jsonl line 2 (row 1): not valid JSON"


def missing_role(tables: dict[str, Any], folder: Path) -> str:
    write_rows(folder / "rows.jsonl", [{"messages": [{"content": "x"}]}])
    return "messages[0].role is missing"


def unknown_template(tables: dict[str, Any], folder: Path) -> str:
    tables["template"]["name"] = "tullu"
    return "template.name = 'tullu'"


def unknown_key(tables: dict[str, Any], folder: Path) -> str:
    tables["max_seq_length"] = 3
    return "did you mean 'max_seq_len'"


def missing_file(tables: dict[str, Any], folder: Path) -> str:
    tables["sources"] = [{"path": str(folder / "absent.jsonl")}]
    return "absent.jsonl"


def missing_tokenizer(tables: dict[str, Any], folder: Path) -> str:
    tables["tokenizer"]["name"] = "./absent"
    return "no such directory"


def template_with_a_syntax_error(tables: dict[str, Any], folder: Path) -> str:
    (folder / "bad.jinja").write_text("{% for m in messages %}")
    tables["template"]["name"] = str(folder / "bad.jinja")
    return "line 1"


def no_row_can_be_used(tables: dict[str, Any], folder: Path) -> str:
    write_rows(folder / "rows.jsonl", [{"messages": [{"role": "user", "content": "alone"}]}])
    return "can be used"


def bad_value(tables: dict[str, Any], folder: Path) -> str:
    tables["mask"] = {"boundary": "insid"}
    return "did you mean 'inside'"


CONFIG, DATA, ARTIFACT = 3, 4, 5


@pytest.mark.parametrize(
    ("spoil", "exit_code"),
    [
        (malformed_json, DATA),
        (missing_role, DATA),
        (unknown_template, CONFIG),
        (unknown_key, CONFIG),
        (missing_file, DATA),
        (missing_tokenizer, CONFIG),
        (template_with_a_syntax_error, CONFIG),
        (no_row_can_be_used, DATA),
        (bad_value, CONFIG),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code(
    spoil: Callable[[dict[str, Any], Path], str],
    exit_code: int,
    tables: dict[str, Any],
    tmp_path: Path,
) -> None:
    expected = spoil(tables, tmp_path)
    file = write_toml(tmp_path / "test.toml", tables)
    result = CliRunner().invoke(
        cli, ["build", "-q", "--mixture", str(file), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == exit_code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(result.stderr.splitlines()) == 1
    assert expected in lines[0]
    assert not (tmp_path / "out").exists()


def test_an_unknown_mixture_lists_what_ships() -> None:
    result = CliRunner().invoke(cli, ["build", "--mixture", "demmo"])
    assert result.exit_code == CONFIG
    assert "demo" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "stats", "verify"])
def test_a_damaged_set_is_refused(command: str, tables: dict[str, Any], tmp_path: Path) -> None:
    build_set(tables, tmp_path / "out")
    column = tmp_path / "out/shards/00000/tokens.npy"
    column.write_bytes(column.read_bytes()[:-4])
    result = CliRunner().invoke(cli, [command, str(tmp_path / "out")])
    assert result.exit_code == ARTIFACT
    assert "tokens.npy has" in result.stderr


def test_settings_on_the_command_line_change_the_mixture(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    file = write_toml(tmp_path / "test.toml", tables)
    arguments = [
        "build",
        "--mixture",
        str(file),
        "--out",
        str(tmp_path / "out"),
        "--set",
        "max_seq_len=64",
    ]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["max_seq_len"] == 64


def test_results_go_to_stdout_and_logs_to_stderr(tables: dict[str, Any], tmp_path: Path) -> None:
    file = write_toml(tmp_path / "test.toml", tables)
    result = CliRunner().invoke(
        cli, ["build", "--mixture", str(file), "--out", str(tmp_path / "out")]
    )
    assert "fingerprint" in result.stdout
    assert "fingerprint" not in result.stderr
    assert json.loads(CliRunner().invoke(cli, ["stats", str(tmp_path / "out"), "--json"]).stdout)


def test_the_installed_command_lists_the_mixtures() -> None:
    done = subprocess.run([SFT_PREP, "mixtures"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("demo")
