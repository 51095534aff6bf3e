"""Whole runs on a tiny model: stop and go on, finish, report; one rank, in this process."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import losses, records, status, train_here, weights, write_inputs
from transformers import AutoModelForCausalLM

from shared.shard_reader import open_shard_set
from train.data.step_order import make_order
from train.loop.schedule import learning_rate


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 8 steps."""
    shards, recipe = inputs
    run = tmp_path_factory.mktemp("runs") / "whole"
    result = train_here("--shards", shards, "--recipe", recipe, "--output", run)
    assert result.exit_code == 0, result.output
    return run


def test_the_run_directory_holds_what_the_design_lists(whole: Path) -> None:
    assert status(whole)["state"] == "complete"
    assert {path.name for path in whole.iterdir()} == {
        ".lock", "config.json", "status.json", "metrics.jsonl", "checkpoints", "model", "loss.png",
    }  # fmt: skip
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == [
        "step-00000006",
        "step-00000008",
    ]


def test_records_carry_the_reference_names_and_exact_counts(
    whole: Path, inputs: tuple[Path, Path]
) -> None:
    found, shard_set = records(whole), open_shard_set(inputs[0])
    assert [record["step"] for record in found] == list(range(1, 9))
    names = {
        "step", "epoch", "learning_rate", "train_loss", "grad_norm", "loss_tokens", "total_tokens", "per_device_tps",
        "total_tokens_including_padding", "per_device_tps_including_padding", "step_seconds", "data_seconds", "mfu",
        "memory_gib", "skipped_steps", "loss_tokens_per_second", "padding_share", "train_loss/made-up",
            "load_balancing_loss",
    }  # fmt: skip
    assert all(set(record) == names for record in found)
    assert found[-1]["epoch"] == 3.0
    assert found[-1]["total_tokens"] == found[-1]["total_tokens_including_padding"]
    assert found[-1]["total_tokens"] == 3 * shard_set.manifest.totals.tokens
    assert (
        sum(record["loss_tokens"] for record in found) == 3 * shard_set.manifest.totals.loss_tokens
    )
    config = json.loads((whole / "config.json").read_text())
    assert config["shards"]["fingerprint"] == shard_set.manifest.fingerprint
    assert found[0]["learning_rate"] == 0.0
    assert max(record["learning_rate"] for record in found) == 3e-3


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_run_stopped_and_started_again_logs_the_same_losses_and_ends_with_equal_weights(
    log_every: int, whole: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """The model has dropout: random generators are restored too. With log_every = 3 stops fall
    inside a window."""
    shards, recipe = inputs
    run = tmp_path / "run"
    call = (
        "--shards",
        shards,
        "--recipe",
        recipe,
        "--output",
        run,
        "--set",
        f"log.every_steps={log_every}",
    )
    for _ in range(3):
        result = train_here(*call, "--stop-after", 2)
        assert result.exit_code == 75
        assert "stopped after step" in result.stderr
        assert status(run)["state"] == "stopped"
    assert train_here(*call).exit_code == 0
    expected = [loss for _, loss in losses(whole)]
    windows = [range(start, min(start + log_every, 8)) for start in range(0, 8, log_every)]
    assert losses(run) == [(w[-1] + 1, sum(expected[i] for i in w) / len(w)) for w in windows]
    counted = {record["step"]: record["total_tokens"] for record in records(whole)}
    assert [record["total_tokens"] for record in records(run)] == [
        counted[w[-1] + 1] for w in windows
    ]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(run)[name]), name


def test_the_same_command_after_the_end_says_so_and_makes_a_missing_export(
    whole: Path, inputs: tuple[Path, Path]
) -> None:
    shards, recipe = inputs
    call = ("--shards", shards, "--recipe", recipe, "--output", whole)
    before, stamp = weights(whole), (whole / "metrics.jsonl").read_bytes()
    again = train_here(*call)
    assert again.exit_code == 0
    assert "is complete" in again.stdout
    os.rename(whole / "model", whole / "gone")
    assert train_here(*call).exit_code == 0
    assert (whole / "metrics.jsonl").read_bytes() == stamp
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, before[name])


def test_the_logged_loss_is_that_of_the_exported_weights(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """With a learning rate of 0 in the first step the export of step 1 is the model that gave its
    loss."""
    shards, recipe = inputs
    run = tmp_path / "run"
    call = ("--shards", shards, "--recipe", recipe, "--output", run, "--max-steps", 1)
    assert train_here(*call, "--set", "model.config.attention_dropout=0.0").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(run / "model", attn_implementation="eager")
    shard_set = open_shard_set(shards)
    order = make_order(
        fingerprint=shard_set.manifest.fingerprint,
        seed=0,
        num_units=10,
        units_per_step=4,
        unit="pack",
        epochs=1,
        max_steps=1,
    )
    total, count = 0.0, 0
    for pack in map(shard_set.pack, order.step(0).tolist()):
        for start, end in zip(pack.seq_offsets, pack.seq_offsets[1:], strict=False):
            ids = torch.tensor(pack.tokens[start:end].astype("int64"))
            mask = torch.tensor(pack.loss_mask[start:end].astype(bool))[1:]
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total += (
                torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[mask]
                .sum()
                .item()
            )
            count += int(mask.sum())
    assert losses(run)[0][1] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("way", ["SIGTERM", "SIGUSR1", "SIGINT", "STOP"])
def test_a_signal_or_a_file_saves_at_the_end_of_the_step(
    way: str, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, recipe = inputs
    sent = []

    def rate_and_signal(step: int, **options: Any) -> float:
        if step == 2 and not sent:
            sent.append(way)
            (run / "STOP").touch() if way == "STOP" else os.kill(os.getpid(), signal.Signals[way])
        return learning_rate(step, **options)

    monkeypatch.setattr("train.loop.loop.learning_rate", rate_and_signal)
    run = tmp_path / "run"
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    result = train_here("--shards", shards, "--recipe", recipe, "--output", run)
    assert result.exit_code == 75
    assert [path.name for path in (run / "checkpoints").iterdir() if "step-00000003" in path.name]
    assert status(run) == {"state": "stopped", "exit_code": 75, "message": status(run)["message"]}
    assert not (run / "STOP").exists()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_stops_before_the_update_and_names_the_packs(
    stage: int, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.loop import loop

    engines = []

    def spoil(engine: Any, *arguments: Any) -> torch.Tensor:
        engines.append(engine)
        if len(engines) == 3:
            arguments[0][0].weights[0] = math.nan
        return accumulate(engine, *arguments)

    accumulate = loop.accumulate
    monkeypatch.setattr(loop, "accumulate", spoil)
    shards, recipe = inputs
    run = tmp_path / "run"
    result = train_here(
        "--shards",
        shards,
        "--recipe",
        recipe,
        "--output",
        run,
        "--set",
        f"engine.zero_stage={stage}",
    )
    assert result.exit_code == 4
    assert result.stderr.count("error:") == 1
    assert "step 3: the loss or a gradient is not finite" in result.stderr
    assert "Its packs: " in result.stderr
    assert status(run)["exit_code"] == 4
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    master = [p for group in engines[0].optimizer.param_groups for p in group["params"]]
    assert all(torch.isfinite(parameter).all() for parameter in master)


def test_two_runs_do_not_share_a_directory(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    import subprocess
    import sys

    run = tmp_path / "run"
    holder = (
        "import sys, time; from pathlib import Path; from shared.atomic import exclusive_lock\nwith"
        " exclusive_lock(Path(sys.argv[1]), 'training'): print('held', flush=True);"
        " sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(run / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        result = train_here("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
        assert process.stdin is not None
        process.stdin.close()
    assert result.exit_code == 5
    assert "another process is training in" in result.stderr
    assert not (run / "config.json").exists()
