"""Two nodes for real: rendezvous, gloo and ZeRO-3 between two network namespaces, and a cable cut
in mid-step."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_doubles import write_programs
from train_runs import RECIPE, command, losses, status, train_apart, weights, write_inputs
from two_nodes import ADDRESSES, SSH, TwoNodes, missing, two_nodes, write_hostfile

pytestmark = pytest.mark.full

STEPS = 40
TRAIN = ("--shards", "set", "--recipe", "tiny.toml", "--max-steps", STEPS)


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with two_nodes() as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, recipe=RECIPE)
    return tmp_path


def start(folder: Path, nodes: TwoNodes, run: str, *more: object) -> "subprocess.Popen[str]":
    """Start the command that a person would type, on both nodes."""
    places = json.dumps(dict(zip(ADDRESSES, nodes.namespaces, strict=True)))
    env = write_programs(folder / "bin", ssh=SSH) | {"NAMESPACES": places}
    here = (
        "--deepspeed-hostfile",
        write_hostfile(folder),
        "--submit",
        "--env",
        f"GLOO_SOCKET_IFNAME={nodes.interface}",
    )
    call = command("launch", *here, "--max-restarts", 0, "--", *TRAIN, "--output", run, *more)
    return subprocess.Popen(
        call, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end(process: "subprocess.Popen[str]", run: Path, *, within: float) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=within)
    finally:
        process.kill()
    logs = "\n".join(f"== {path}\n{path.read_text()}" for path in sorted(run.rglob("*.log")))
    return process.returncode, f"{said}\n{logs}"


def wait_for_steps(process: "subprocess.Popen[str]", run: Path, num_steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < num_steps:
        assert process.poll() is None, end(process, run, within=5)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_nodes_train_as_two_ranks_of_one_and_go_on_after_their_link_was_cut(
    folder: Path, nodes: TwoNodes
) -> None:
    assert train_apart(*TRAIN, "--output", "one", "--nproc-per-node", 2).returncode == 0
    assert [step for step, _ in losses(Path("one"))] == list(range(1, STEPS + 1))

    code, said = end(start(folder, nodes, "two"), Path("two"), within=180)
    assert code == 0, said
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
        code, said = end(process, cut, within=180)
    finally:
        process.kill()
    assert code == 1, said
    assert status(cut)["state"] == "failed", said
    assert status(cut)["message"] in said
    last = losses(cut)[-1][0]
    assert 3 <= last < STEPS, "the cable was cut too late"

    nodes.set_link("up")
    code, said = end(start(folder, nodes, "cut", *limit), cut, within=180)
    assert code == 0, said
    assert "resuming after step" in said
    assert losses(cut) == losses(Path("one"))
    cut_weights = weights(cut)
    assert all(bool((cut_weights[name] == one[name]).all()) for name in one)
