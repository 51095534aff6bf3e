"""Starting by hostfile and by hand: what is read, what is refused, and the exact words that each
node gets."""

import itertools
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cluster_doubles import write_programs
from train_runs import write_inputs

from shared.errors import ConfigError
from train.cli.main import cli
from train.launch.hostfile import read_hostfile
from train.launch.multi_node import suggested_command
from train.run.command_line import console_script
from train.run.prepare import TrainRequest


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)
    return write_inputs(tmp_path)


def launch(*options: object, train: tuple[object, ...] = ()) -> Result:
    call = (
        "launch",
        *options,
        "--",
        "--shards",
        "set",
        "--recipe",
        "tiny.toml",
        "--output",
        "a run",
        *train,
    )
    return CliRunner().invoke(cli, [str(argument) for argument in call], catch_exceptions=False)


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_hosts_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    path = hostfile(
        tmp_path, "# the new ones\n\n  node-1\t slots=8  # rack 3\nme@10.0.0.2 slots=8\n"
    )
    hosts = read_hostfile(path)
    assert (hosts.names, hosts.addresses, hosts.slots) == (
        ("node-1", "me@10.0.0.2"),
        ("node-1", "10.0.0.2"),
        8,
    )
    from deepspeed.launcher.runner import _parse_hostfile

    assert _parse_hostfile(path.read_text().splitlines()) == {"node-1": 8, "me@10.0.0.2": 8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=8\nb\n", "line 2: 'b'; expected `HOST slots=N`"),
        ("a slots=0\n", "line 1: 'a slots=0'; expected"),
        ("a slots=8 max_slots=9\n", "line 1"),
        ("-oProxyCommand=x slots=8\n", "line 1"),
        ("a;x slots=8\n", "line 1"),
        (
            "a slots=8\nb slots=4\n",
            "line 2: b has 4 slots and a has 8; every node runs the same number of ranks",
        ),
        ("a slots=8\na slots=8\n", "line 2: a is listed twice"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_bad_hostfile_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="hosts") as caught:
        read_hostfile(hostfile(tmp_path, text))
    assert message in str(caught.value)


def test_a_hostfile_that_is_not_there(inputs: tuple[Path, Path]) -> None:
    result = launch("--deepspeed-hostfile", "nowhere")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "cannot read the hostfile nowhere" in result.stderr


def test_each_host_gets_its_own_line_of_shell(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    path = hostfile(tmp_path, "me@h1 slots=2\nh2 slots=2\n")
    result = launch(
        "--deepspeed-hostfile", path, "--env", "A=b c", "--rdzv-port", 1234, "--max-restarts", 1
    )
    assert result.exit_code == 0, result.output
    first, second = (shlex.split(line) for line in result.stdout.splitlines())
    assert first[:5] == ["ssh", "-o", "BatchMode=yes", "-tt", "me@h1"]
    assert second[4] == "h2"
    there = shlex.split(first[5])
    assert there[:2] == ["cd", str(tmp_path)]
    words = there[there.index("exec") + 1 :]
    assert words[:2] == ["env", "A=b c"]
    assert words[words.index("--rdzv-endpoint") + 1] == "h1:1234"
    assert words[words.index("--local-addr") + 1] == "h1"
    assert words[words.index("--no-python") + 1] == str(console_script())
    assert words[words.index("--output") + 1] == "a run"
    assert ("--nnodes", "2") in itertools.pairwise(words)
    differing = [
        (a, b)
        for a, b in zip(words, shlex.split(second[5])[there.index("exec") + 1 :], strict=True)
        if a != b
    ]
    assert differing == [("is_host=1", "is_host=0"), ("h1", "h2")]


def test_a_shape_that_contradicts_the_hostfile_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    path = hostfile(tmp_path, "h1 slots=2\nh2 slots=2\n")
    assert launch("--deepspeed-hostfile", path, "--nodes", 2, "--gpus-per-node", 2).exit_code == 0
    result = launch("--deepspeed-hostfile", path, "--nodes", 3)
    assert result.exit_code == 3
    assert "--nodes 3, but" in result.stderr
    result = launch("--torchrun", "--nodes", 2)
    assert result.exit_code == 3
    assert "give --nodes and --gpus-per-node" in result.stderr


def test_by_hand_the_head_and_the_others_get_a_line(inputs: tuple[Path, Path]) -> None:
    shape = ("--torchrun", "--nodes", 4, "--gpus-per-node", 1)
    result = launch(*shape, "--head", "fe80::1")
    assert result.exit_code == 0, result.output
    who_first, first, who_others, others, how = result.stdout.splitlines()
    assert (who_first, who_others) == ("# on fe80::1, the head", "# on each of the other 3 nodes")
    assert how == "# how it ended: sft-train status 'a run'"
    first_words, other_words = shlex.split(first), shlex.split(others)
    assert "[fe80::1]:29500" in first_words
    assert {"is_host=1", "--local-addr"} <= set(first_words)
    assert "is_host=0" in other_words
    assert "--local-addr" not in other_words
    result = launch(*shape, "--head", "localhost")
    assert result.exit_code == 3
    assert "other nodes cannot reach" in result.stderr
    assert launch(*shape, "--head", "h", "--submit").exit_code == 3


def test_a_host_that_ssh_cannot_reach_ends_the_others(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "import sys, time\nif 'h2' in sys.argv: sys.exit('ssh: no route to h2')\ntime.sleep(600)"
    monkeypatch.setenv("PATH", write_programs(tmp_path / "bin", ssh=said)["PATH"])
    monkeypatch.setattr("train.launch.ssh._SECONDS_FOR_THE_OTHERS", 0.2)
    result = launch(
        "--deepspeed-hostfile", hostfile(tmp_path, "h1 slots=1\nh2 slots=1\n"), "--submit"
    )
    assert result.exit_code == 1
    assert "h2 ended with exit code 1; see a run/logs/h2.log for the reason" in result.stderr
    assert "no route" in Path("a run/logs/h2.log").read_text()


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
    call = [
        "launch",
        "--deepspeed-hostfile",
        str(path),
        "--submit",
        "--",
        "--shards",
        "set",
        "--recipe",
        "tiny.toml",
    ]
    with subprocess.Popen(
        [str(console_script()), *call], env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while (
            not (Path("ready-h1").exists() and Path("ready-h2").exists())
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert "SIGTERM: the run stops after this step" in said
    assert process.returncode == 0, said  # a real rank would have left its word in status.json


def test_the_line_suggested_to_a_person_starts_the_same_run(inputs: tuple[Path, Path]) -> None:
    request = TrainRequest(shards=Path("my set"), recipe="tiny.toml", settings=("run.seed=3",))
    alone = shlex.split(suggested_command(request, num_nodes=1, gpus_per_node=8))
    assert alone == [
        "sft-train",
        "--shards",
        "my set",
        "--recipe",
        "tiny.toml",
        "--set",
        "run.seed=3",
        "--nproc-per-node",
        "8",
    ]
    many = shlex.split(suggested_command(request, num_nodes=8, gpus_per_node=8))
    assert many[2 : many.index("--")] == [
        "--nodes",
        "8",
        "--gpus-per-node",
        "8",
        "--slurm",
        "--submit",
    ]
    assert many[many.index("--") + 1 :] == alone[1:-2]
