"""Records: cut back to the checkpoint on resume, torn lines tolerated; MFU counts what a step needs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from train.flops import model_cost, peak_flops
from train.metrics import console_line, keep_records, read_records


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_records_after_the_checkpoint_and_a_torn_line_go_away(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "train_loss": 1.0 / step}) for step in (1, 2, 3, 4)]
    path = write(tmp_path / "metrics.jsonl", *lines, '{"step": 5, "trai')
    keep_records(path, up_to_step=3)
    assert path.read_text().endswith("\n")
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_missing_file_is_no_records_to_cut(tmp_path: Path) -> None:
    keep_records(tmp_path / "metrics.jsonl", up_to_step=0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_console_line_shows_a_step_without_loss_tokens_as_such() -> None:
    record = {
        "step": 3, "train_loss": None, "learning_rate": 1e-5, "grad_norm": 0.0, "per_device_tps": 1234.5,
        "step_seconds": 0.5, "mfu": None,
    }  # fmt: skip
    assert console_line(record, 9) == "step 3/9  loss -  lr 1.00e-05  grad 0  1,234 tok/s/device  0.50 s/step"
    assert console_line({**record, "train_loss": 2.0, "mfu": 0.375}, 9).endswith("mfu 37.5%")


def test_flops_of_a_step_follow_the_formula() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100,
    )  # fmt: skip
    cost = model_cost(AutoModelForCausalLM.from_config(config))
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert cost.body == 6 * (2 * layer + 32)
    assert cost.head == 6 * 32 * 100
    # one sequence of 10 tokens: 2 layers x 4 heads x 8 x (10 x 10 / 2) pairs x 2 products x 2 x 3 passes
    assert cost.flops(tokens=0, loss_tokens=0, squared_lengths=100) == 2 * 32 * 50 * 2 * 2 * 3
    assert cost.flops(tokens=2, loss_tokens=3, squared_lengths=0) == 2 * cost.body + 3 * cost.head


@pytest.mark.parametrize("device", ["cpu"])
def test_there_is_no_mfu_without_a_known_peak(device: str) -> None:
    assert peak_flops(torch.device(device)) is None
