"""The options of plan, launch and selftest reach the requests that are made of them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from train_runs import train_here, write_inputs

from train.cli import before_a_run
from train.estimate.data_size import StatedSizes
from train.estimate.plan import EstimateRequest
from train.launch.multi_node import LaunchRequest
from train.launch.slurm import SlurmOptions
from train.run.prepare import TrainRequest


@pytest.mark.parametrize(
    ("command", "classes", "made"),
    [
        (before_a_run.plan, (EstimateRequest, StatedSizes), {"train", "sizes"}),
        (before_a_run.launch, (LaunchRequest, SlurmOptions), {"train"}),
    ],
)
def test_every_field_of_a_request_is_an_option_of_its_name(
    command: Any, classes: tuple[Any, ...], made: set[str]
) -> None:
    fields = {field.name for cls in classes for field in dataclasses.fields(cls)}
    assert fields - {parameter.name for parameter in command.params} == made


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--rows", 5),
        ("--rows", 5, "--tokens", 9),
        ("--shards", "s", "--tokens", 9),
        ("--shards", "s", "--rows", 5, "--tokens", 9, "--loss-tokens", 3),
    ],
)
def test_plan_takes_a_shard_set_or_all_of_its_sizes(arguments: tuple[object, ...]) -> None:
    result = train_here("plan", *arguments)
    assert result.exit_code == 2
    assert "Give --shards, or all of --rows, --tokens and --loss-tokens." in result.stderr


def test_plan_makes_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[EstimateRequest] = []
    monkeypatch.setattr("train.estimate.plan.make_plan", requests.append)
    monkeypatch.setattr("train.estimate.report.as_text", lambda _: "the estimate")
    sizes = ("--rows", 5, "--tokens", 90, "--loss-tokens", 30, "--max-seq-len", 64)
    recipe = ("--recipe", "debug", "--model", "m", "--set", "a=1", "--set", "b=2", "--max-steps", 3)
    machine = ("--gpus", 16, "--gpus-per-node", 4, "--gpu", "A100", "--mfu", 0.5, "--price", 2)
    result = train_here("plan", *sizes, *recipe, *machine)
    assert result.output == "the estimate\n"
    train_here("plan", "--shards", "s")
    stated, counted = requests
    assert stated.sizes == StatedSizes(rows=5, tokens=90, loss_tokens=30, max_seq_len=64)
    assert stated.train == TrainRequest(
        shards=Path("SHARDS"), recipe="debug", model="m", settings=("a=1", "b=2"), max_steps=3
    )
    assert (stated.num_gpus, stated.gpus_per_node, stated.gpu) == (16, 4, "A100")
    assert (stated.mfu, stated.price) == (0.5, 2.0)
    assert counted.sizes is None
    assert counted.train == TrainRequest(shards=Path("s"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--", "--shards", "s"), "Give one of --slurm, --torchrun and --deepspeed-hostfile."),
        (("--slurm", "--deepspeed-hostfile", "h", "--", "--shards", "s"), "Give one of --slurm"),
        (("--slurm",), "Missing option '--shards' among those of sft-train, after --."),
        (
            ("--slurm", "--", "--shards", "s", "--nproc-per-node", 2),
            "Give --gpus-per-node instead of --nproc-per-node.",
        ),
        (("--slurm", "--", "--shards", "s", "--no-such-option"), "No such option"),
    ],
)
def test_launch_names_the_option_that_is_missing_or_too_many(
    arguments: tuple[object, ...], message: str
) -> None:
    result = train_here("launch", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_launch_makes_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def record(*arguments: object) -> str:
        calls.append(arguments)
        return "how to start it"

    for name in ("launch_by_slurm", "launch_by_hand", "launch_by_ssh"):
        monkeypatch.setattr(f"train.launch.multi_node.{name}", record)
    cluster = ("--nodes", 4, "--gpus-per-node", 8, "--max-restarts", 1, "--seconds-to-save", 60)
    more = ("--rdzv-port", 1234, "--env", "A=1", "--env", "B=2", "--submit")
    job = ("--job-name", "j", "--partition", "p", "--account", "a", "--time", "1:00:00")
    cpus = ("--cpus-per-node", 12, "--sbatch", "mem=0", "--sbatch", "exclusive")
    train = ("--", "--shards", "s", "--max-steps", 5, "-q")
    assert train_here("launch", "--slurm", *cluster, *more, *job, *cpus, *train).output == (
        "how to start it\n"
    )
    train_here("launch", "--torchrun", "--head", "node1", *train)
    train_here("launch", "--deepspeed-hostfile", "hosts", *train)
    request = TrainRequest(shards=Path("s"), max_steps=5, verbosity=-1)
    plain = LaunchRequest(
        train=request,
        num_nodes=None,
        gpus_per_node=None,
        max_restarts=3,
        seconds_to_save=600,
        port=None,
        environment=(),
        submit=False,
    )
    full = LaunchRequest(
        train=request,
        num_nodes=4,
        gpus_per_node=8,
        max_restarts=1,
        seconds_to_save=60,
        port=1234,
        environment=("A=1", "B=2"),
        submit=True,
    )
    options = SlurmOptions(
        job_name="j",
        partition="p",
        account="a",
        time="1:00:00",
        cpus_per_node=12,
        others=("mem=0", "exclusive"),
    )
    assert calls == [(full, options), (plain, "node1"), (plain, Path("hosts"))]


def test_selftest_gets_its_request_and_ends_with_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shards, recipe = write_inputs(tmp_path)
    calls = []

    class Report:
        def lines(self) -> list[str]:
            return ["all is well"]

        def check(self) -> None:
            calls.append("checked")

    def record(request: TrainRequest, *, layers: int | None, tokens: int) -> Report:
        calls.append((request, layers, tokens))
        return Report()

    monkeypatch.setattr("train.selftest.selftest.selftest", record)
    result = train_here("selftest", "--shards", shards, "--recipe", recipe, "--layers", 1)
    assert result.output == "all is well\n"
    assert calls == [(TrainRequest(shards=shards, recipe=str(recipe)), 1, 768), "checked"]


def test_the_recipes_that_ship_are_listed_with_their_sentence() -> None:
    lines = train_here("recipes").output.splitlines()
    assert any(line.startswith("tiny  ") for line in lines)
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)
