"""Starting by ssh: the words that each host gets, a host that cannot be reached, and a stop."""

import itertools
import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from cluster_doubles import write_programs
from train_runs import command, launch_here, write_inputs

from train.run.command_line import console_script


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)
    return write_inputs(tmp_path)


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_each_host_gets_its_own_line_of_shell(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    path = hostfile(tmp_path, "me@h1 slots=2\nh2 slots=2\n")
    options = ("--env", "A=b c", "--rdzv-port", 1234, "--max-restarts", 1)
    result = launch_here("--deepspeed-hostfile", path, *options, output="a run")
    assert result.exit_code == 0, result.output
    first, second = (shlex.split(line) for line in result.stdout.splitlines())
    assert first[:5] == ["ssh", "-o", "BatchMode=yes", "-tt", "me@h1"]
    assert second[4] == "h2"
    line, other_line = shlex.split(first[5]), shlex.split(second[5])
    assert line[:2] == ["cd", str(tmp_path)]
    words = line[line.index("exec") + 1 :]
    assert words[:2] == ["env", "A=b c"]
    assert words[words.index("--rdzv-endpoint") + 1] == "h1:1234"
    assert words[words.index("--local-addr") + 1] == "h1"
    assert words[words.index("--no-python") + 1] == str(console_script())
    assert words[words.index("--output") + 1] == "a run"
    assert ("--nnodes", "2") in itertools.pairwise(words)
    differing = [(a, b) for a, b in zip(line, other_line, strict=True) if a != b]
    assert differing == [("is_host=1", "is_host=0"), ("h1", "h2")]


def test_a_host_that_ssh_cannot_reach_ends_the_others(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = (
        "import os, sys, time\n"
        "if 'h2' in sys.argv: sys.exit('ssh: no route to h2')\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)"
    )
    monkeypatch.setenv("PATH", write_programs(tmp_path / "bin", ssh=ssh)["PATH"])
    monkeypatch.setattr("train.launch.ssh._SECONDS_FOR_THE_OTHERS", 0.2)
    path = hostfile(tmp_path, "h1 slots=1\nh2 slots=1\n")
    result = launch_here("--deepspeed-hostfile", path, "--submit")
    assert result.exit_code == 1
    assert "h2 ended with exit code 1; see run/logs/h2.log for the reason" in result.stderr
    assert "no route" in Path("run/logs/h2.log").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("run/logs/h1.log").read_text()), 0)


def test_without_ssh_the_error_is_one_line(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    path = hostfile(tmp_path, "h1 slots=1\n")
    result = launch_here("--deepspeed-hostfile", path, "--submit")
    assert (result.exit_code, result.stderr.count("\n")) == (6, 2), result.stderr
    assert "no command ssh" in result.stderr


def test_a_signal_becomes_the_file_that_every_rank_obeys(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """The double of ssh ends, as torchrun on each host does, when the ranks have seen the file."""
    ssh = (
        "import pathlib, time\n"
        "pathlib.Path(f'ready-{sys.argv[-2]}').touch()\n"
        "while not pathlib.Path('runs/tiny-tiny/STOP').exists(): time.sleep(0.02)\n"
    )
    env = write_programs(tmp_path / "bin", ssh=f"import sys\n{ssh}")
    path = hostfile(tmp_path, "h1 slots=1\nh2 slots=1\n")
    train = ("--shards", "set", "--recipe", "tiny.toml")
    call = command("launch", "--deepspeed-hostfile", path, "--submit", "--", *train)
    with subprocess.Popen(call, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-h*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        _, stderr = process.communicate(timeout=60)
    assert "SIGTERM: the run stops after this step" in stderr
    # A real rank would have written status.json, and with it another exit code.
    assert process.returncode == 0, stderr
