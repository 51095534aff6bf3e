"""`sft-train launch`: the shape of the cluster, the lines to run by hand, the suggested command."""

import shlex
from pathlib import Path

import pytest
from train_runs import launch_here, train_here, write_inputs

from train.launch.multi_node import suggested_command
from train.run.prepare import TrainRequest


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)
    return write_inputs(tmp_path)


def test_a_shape_that_contradicts_the_hostfile_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "hosts"
    path.write_text("h1 slots=2\nh2 slots=2\n")
    by_ssh = ("--deepspeed-hostfile", path)
    assert launch_here(*by_ssh, "--nodes", 2, "--gpus-per-node", 2).exit_code == 0
    result = launch_here(*by_ssh, "--nodes", 3)
    assert result.exit_code == 3
    assert f"--nodes 3, but {path} has 2" in result.stderr
    result = launch_here("--torchrun", "--nodes", 2)
    assert result.exit_code == 3
    assert "give --nodes and --gpus-per-node" in result.stderr


def test_by_hand_the_head_and_the_others_get_a_line(inputs: tuple[Path, Path]) -> None:
    shape = ("--torchrun", "--nodes", 4, "--gpus-per-node", 1)
    result = launch_here(*shape, "--head", "fe80::1", output="a run")
    assert result.exit_code == 0, result.output
    who_first, first, who_others, others, how = result.stdout.splitlines()
    assert (who_first, who_others) == ("# on fe80::1, the head", "# on each of the other 3 nodes")
    assert how == "# how it ended: sft-train status 'a run'"
    first_words, other_words = shlex.split(first), shlex.split(others)
    assert "[fe80::1]:29500" in first_words
    assert {"is_host=1", "--local-addr"} <= set(first_words)
    assert "is_host=0" in other_words
    assert "--local-addr" not in other_words
    result = launch_here(*shape, "--head", "localhost")
    assert result.exit_code == 3
    assert "other nodes cannot reach" in result.stderr
    assert launch_here(*shape, "--head", "h", "--submit").exit_code == 3


def test_the_line_suggested_to_a_person_starts_the_same_run(inputs: tuple[Path, Path]) -> None:
    request = TrainRequest(shards=Path("my set"), recipe="tiny.toml", settings=("run.seed=3",))
    train = ["--shards", "my set", "--recipe", "tiny.toml", "--set", "run.seed=3"]
    alone = suggested_command(request, num_nodes=1, gpus_per_node=8)
    assert shlex.split(alone) == ["sft-train", *train, "--nproc-per-node", "8"]
    many = suggested_command(request, num_nodes=8, gpus_per_node=8)
    shape = ["--nodes", "8", "--gpus-per-node", "8"]
    launch = ["sft-train", "launch", *shape, "--slurm", "--submit", "--"]
    assert shlex.split(many) == [*launch, *train]


def test_a_run_that_is_complete_starts_nothing(inputs: tuple[Path, Path]) -> None:
    call = ("--shards", "set", "--recipe", "tiny.toml", "--output", "run")
    assert train_here(*call, "--max-steps", 1).exit_code == 0
    options = ("--torchrun", "--nodes", 2, "--gpus-per-node", 1, "--head", "h")
    train = ("--max-steps", 1)
    done = launch_here(*options, train=train)
    assert done.stdout == "run is complete: the model is in run/model\n"
    done = launch_here(*options, train=(*train, "--push-to-hub", "me/model"))
    assert "push it with sft-train push [--checkpoints] run USER/NAME" in done.stdout
