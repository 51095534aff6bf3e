"""`prep`, `train` and `shared` are common names: a user's files of the same name must not be run in
place of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = [
    ["sft-prep", "--help"],
    ["sft-prep", "mixtures"],
    ["sft-train", "--help"],
    ["sft-train", "recipes"],
]
TRAP = 'raise SystemExit("the user\'s own file was imported")\n'


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name(command[0])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [script, *command[1:]],
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory as users have them: with a train.py, a prep.py and a package `shared`."""
    for name in ("train.py", "prep.py", "shared/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TRAP, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_run_beside_files_of_the_same_names(project: Path, command: list[str]) -> None:
    expected = run(command, project.parent)
    assert expected.returncode == 0, expected.stderr
    found = run(command, project)
    assert (found.returncode, found.stdout, found.stderr) == (0, expected.stdout, expected.stderr)


@pytest.mark.parametrize("name", ["sft-prep", "sft-train"])
@pytest.mark.parametrize("foreign", ["shared/__init__.py", "shared.py"])
def test_a_foreign_shared_on_the_path_is_named_and_stops_the_command_unread(
    tmp_path: Path, name: str, foreign: str
) -> None:
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text(TRAP, encoding="utf-8")
    done = run([name, "--help"], tmp_path.parent, PYTHONPATH=str(tmp_path))
    assert done.returncode == 6, done.stderr
    assert done.stderr.startswith("error: the package `shared` ")
    assert str(tmp_path / foreign) in done.stderr
    assert done.stderr.count("\n") == 1
