"""Whole runs of one rank, in this process: what they leave behind, and who may start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_runs import losses, records, status, train_here, weights, write_inputs
from transformers import AutoModelForCausalLM

from shared.shard_reader import open_shard_set
from train.data.step_order import make_order


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 8 steps."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    result = train_here("--shards", inputs[0], "--recipe", inputs[1], "--output", run)
    assert result.exit_code == 0, result.output
    return run


def test_the_run_directory_holds_these_files(whole: Path) -> None:
    names = {".lock", "config.json", "status.json", "metrics.jsonl", "loss.png"}
    assert {path.name for path in whole.iterdir()} == names | {"checkpoints", "model"}
    checkpoints = {path.name for path in (whole / "checkpoints").iterdir()}
    assert checkpoints == {"step-00000006", "step-00000008"}
    assert status(whole)["state"] == "complete"


def test_records_count_every_token_of_the_run(whole: Path, inputs: tuple[Path, Path]) -> None:
    run_records, manifest = records(whole), open_shard_set(inputs[0]).manifest
    last = run_records[-1]
    assert [record["step"] for record in run_records] == list(range(1, 9))
    assert last["epoch"] == 3.0
    assert last["total_tokens"] == last["total_tokens_including_padding"]
    assert last["total_tokens"] == 3 * manifest.totals.tokens
    loss_tokens = sum(record["loss_tokens"] for record in run_records)
    assert loss_tokens == 3 * manifest.totals.loss_tokens
    config = json.loads((whole / "config.json").read_text())
    assert config["shards"]["fingerprint"] == manifest.fingerprint
    assert run_records[0]["learning_rate"] == 0.0
    assert max(record["learning_rate"] for record in run_records) == 3e-3


def test_the_same_command_after_the_end_trains_nothing_but_makes_a_missing_export(
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
            losses_of = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total += losses_of[mask].sum().item()
            count += int(mask.sum())
    assert losses(run)[0][1] == pytest.approx(total / count, rel=1e-6)


def test_two_runs_do_not_share_a_directory(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = (
        "import sys; from pathlib import Path; from shared.atomic import exclusive_lock\n"
        "with exclusive_lock(Path(sys.argv[1]), 'training'):\n"
        "    print('held', flush=True); sys.stdin.read()"
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
