"""The command of one node means what it says, also through a shell; and two nodes for real:
rendezvous, gloo and ZeRO-3 between two network namespaces, and a cable that is cut in mid-step."""

import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_doubles import write_programs
from train_runs import RECIPE, command, losses, status, train_apart, weights, write_inputs
from two_nodes import ADDRESSES, SSH, TwoNodes, missing, two_nodes, write_hostfile

from train.launch.torchrun import (
    Cluster,
    ShellWord,
    node_command,
    rendezvous_options,
    shell_line,
    shell_lines,
    standalone_command,
)
from train.run.prepare import TrainRequest

STEPS = 40
TRAIN = ("--shards", "set", "--recipe", "tiny.toml", "--max-steps", STEPS)


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, recipe=RECIPE)
    return tmp_path


def start(folder: Path, nodes: TwoNodes, run: str, *more: object) -> "subprocess.Popen[str]":
    """Start the command that a person would type, on both nodes."""
    namespaces = json.dumps(dict(zip(ADDRESSES, nodes.namespaces, strict=True)))
    env = write_programs(folder / "bin", ssh=SSH) | {"NAMESPACES": namespaces}
    options = ("--deepspeed-hostfile", write_hostfile(folder), "--submit", "--max-restarts", 0)
    options += ("--env", f"GLOO_SOCKET_IFNAME={nodes.interface}")
    call = command("launch", *options, "--", *TRAIN, "--output", run, *more)
    pipe = subprocess.PIPE
    return subprocess.Popen(call, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def end(process: "subprocess.Popen[str]", run: Path, *, within: float) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=within)
    finally:
        process.kill()
    logs = "\n".join(f"== {path}\n{path.read_text()}" for path in sorted(run.rglob("*.log")))
    return process.returncode, f"{output}\n{logs}"


def wait_for_steps(process: "subprocess.Popen[str]", run: Path, num_steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < num_steps:
        assert process.poll() is None, end(process, run, within=5)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("seed", range(20))
def test_a_line_of_shell_means_exactly_its_words(seed: int) -> None:
    draw = random.Random(seed)
    letters = "ab '\"\\$`!*?#;&|<>(){}[]~\n\t=%é-"
    words = ["".join(draw.choices(letters, k=draw.randrange(6))) for _ in range(5)]
    variables = [f"V{number}={word}" for number, word in enumerate(words)]
    code = "import os, sys; print([sys.argv[1:], [os.environ[f'V{n}'] for n in range(5)]])"
    command = [sys.executable, "-c", code, *words]
    line = shell_line(command, variables)
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == f"{[words, words]}\n"
    lines = shell_lines(["printf", "%s|", *words])
    done = subprocess.run(["sh", "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"{word}|" for word in words)


def test_a_word_of_shell_text_is_not_quoted_again() -> None:
    assert shell_line(["echo", ShellWord('"$HOME"'), "$HOME"]) == "echo \"$HOME\" '$HOME'"


def test_a_node_learns_the_shape_of_the_cluster_and_who_hosts_the_rendezvous() -> None:
    cluster = Cluster(num_nodes=4, gpus_per_node=8, max_restarts=2, seconds_to_save=300)
    rendezvous = rendezvous_options("fe80::1", 1234, "run", is_host=True, address="fe80::1")
    words = node_command(cluster, TrainRequest(shards=Path("s")), rendezvous)
    options = dict(itertools.pairwise(words))
    assert (options["--nnodes"], options["--nproc-per-node"]) == ("4", "8")
    assert (options["--rdzv-endpoint"], options["--rdzv-conf"]) == ("[fe80::1]:1234", "is_host=1")
    assert (options["--max-restarts"], options["--shutdown-timeout"]) == ("2", "300")
    assert Path(options["--no-python"]).is_absolute()
    assert words[1] == "-P"
    assert cluster.world_size == 32


def test_torchrun_forwards_signals_waits_for_a_save_and_imports_no_local_file() -> None:
    command = standalone_command(TrainRequest(shards=Path("s")), 4)
    assert command[1:4] == ["-P", "-m", "train.launch.elastic"]
    assert command[command.index("--nproc-per-node") + 1] == "4"
    assert "SIGUSR1" in command[command.index("--signals-to-handle") + 1].split(",")
    assert int(command[command.index("--shutdown-timeout") + 1]) >= 300
    script = command[command.index("--no-python") + 1]
    assert Path(script).name == "sft-train"
    assert Path(script).is_absolute()


@pytest.mark.parametrize("name", ["$local_rank", "${local_rank}", "$$", "a$b", "cost 5$", "plain"])
def test_a_rank_gets_the_words_of_its_command_whatever_torchrun_replaces(name: str) -> None:
    from torch.distributed.elastic.utils import macros

    setting = f"log.wandb_name={name}"
    request = TrainRequest(shards=Path("s"), settings=(setting,))
    words = macros.substitute(standalone_command(request, 2), "1")
    assert words[words.index("--set") + 1] == setting


@pytest.mark.full
def test_two_nodes_train_as_two_ranks_of_one_and_resume_after_their_link_was_cut(
    folder: Path, nodes: TwoNodes
) -> None:
    assert train_apart(*TRAIN, "--output", "one", "--nproc-per-node", 2).returncode == 0
    assert [step for step, _ in losses(Path("one"))] == list(range(1, STEPS + 1))

    code, output = end(start(folder, nodes, "two"), Path("two"), within=180)
    assert code == 0, output
    assert losses(Path("two")) == losses(Path("one"))
    one, two = weights(Path("one")), weights(Path("two"))
    assert all(bool((two[name] == one[name]).all()) for name in one)

    # a hang is declared after six seconds instead of half an hour
    cut = Path("cut")
    limit = ("--set", "run.hang_timeout_minutes=0.1")
    process = start(folder, nodes, "cut", *limit)
    try:
        wait_for_steps(process, cut, 3)
        nodes.set_link("down")
        code, output = end(process, cut, within=180)
    finally:
        process.kill()
    assert code == 1, output
    assert status(cut)["state"] == "failed", output
    assert status(cut)["message"] in output
    last = losses(cut)[-1][0]
    assert 3 <= last < STEPS, "the cable was cut too late"

    nodes.set_link("up")
    code, output = end(start(folder, nodes, "cut", *limit), cut, within=180)
    assert code == 0, output
    assert "resuming after step" in output
    assert losses(cut) == losses(Path("one"))
    cut_weights = weights(cut)
    assert all(bool((cut_weights[name] == one[name]).all()) for name in one)
