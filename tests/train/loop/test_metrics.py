"""Records: cut back to the checkpoint on resume, torn lines tolerated; MFU counts what a step
needs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from train.loop.metrics import console_line
from train.run.records import keep_records, read_records
from train.sizing.flops import model_cost, peak_flops
from train.sizing.gpu_specs import find_gpu


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
    assert (
        console_line(record, 9)
        == "step 3/9  loss -  lr 1.00e-05  grad 0  1,234 tok/s/device  0.50 s/step"
    )
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
    # one sequence of 10 tokens: 2 layers x 4 heads x 8 x (10 x 10 / 2) pairs x 2 products x 2 x 3
    # passes
    assert cost.flops(tokens=0, loss_tokens=0, squared_lengths=100) == 2 * 32 * 50 * 2 * 2 * 3
    assert cost.flops(tokens=2, loss_tokens=3, squared_lengths=0) == 2 * cost.body + 3 * cost.head


ATTENTION, NORMS = (
    4 * 32 * 32,
    2 * 32,
)  # of a layer: q, k, v, o of 4 heads of 8; before attention and experts
EXPERT = 3 * 32 * 16


def mixture_of_experts(kind: str, **options: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=8, vocab_size=100, num_experts_per_tok=2, **options,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize(
    ("kind", "options", "further"),
    [
        ("olmoe", {"num_experts": 8}, 2 * 32),  # norms of queries and keys over all heads
        ("qwen3_moe", {"num_experts": 8}, 2 * 8),  # over one head
        ("mixtral", {"num_local_experts": 8}, 0),
        (
            "qwen2_moe",
            {"num_experts": 8, "shared_expert_intermediate_size": 24},
            3 * 32 + 3 * 32 * 24 + 32,
        ),
    ],  # the last: biases of q, k, v, then an expert that all tokens go through, and its gate
)
def test_of_experts_those_count_that_a_token_goes_through(
    kind: str, options: dict[str, int], further: int
) -> None:
    cost = model_cost(mixture_of_experts(kind, **options))
    assert cost.body == 6 * (
        2 * (ATTENTION + NORMS + further + 8 * 32 + 2 * EXPERT) + 32
    )  # the router has 8 x 32
    assert cost.attention == 6 * 2 * 32


def test_experts_are_known_by_name_where_weights_are_not_whole() -> None:
    model = mixture_of_experts("olmoe", num_experts=8)
    whole = model_cost(model).body
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert model_cost(model).body == whole


def test_a_number_of_active_experts_that_is_not_known_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = mixture_of_experts("olmoe", num_experts=8)
    active = model_cost(model).body
    model.config.num_experts_per_tok = 0
    assert model_cost(model).body == active + 6 * 2 * 6 * EXPERT
    assert "mfu counts all" in caplog.text


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H20", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets_without_sparsity(name: str, peak: float | None) -> None:
    gpu = find_gpu(name)
    assert (gpu.peak_flops if gpu else None) == peak


@pytest.mark.parametrize("device", ["cpu"])
def test_there_is_no_mfu_without_a_known_peak(device: str) -> None:
    assert peak_flops(torch.device(device)) is None
