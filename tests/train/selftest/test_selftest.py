"""`sft-train selftest` passes a model that trains exactly, else it names the failed checks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import train_here, write_inputs

from shared.shard_reader import open_shard_set
from train.config import ModelConfig
from train.model import attention
from train.model.attention import register_attention
from train.model.model import LossModel, build_model
from train.selftest import selftest

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CHECKS = ["neighbours", "later tokens", "packed = alone", "gradients alone", "split", "loss kernel"]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    return write_inputs(tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_that_trains_exactly_passes_every_check(
    inputs: tuple[Path, Path], dtype: str
) -> None:
    done = train_here(
        "selftest", "--shards", inputs[0], "--recipe", inputs[1], "--set", f"engine.dtype={dtype}"
    )
    assert done.exit_code == 0, done.output
    tested, _, *rows = done.stdout.splitlines()
    assert "the whole model" in tested
    assert "packs" in tested
    assert [row[: len(check)] for row, check in zip(rows, CHECKS, strict=True)] == CHECKS
    assert all(row.endswith("ok") for row in rows)


def test_the_report_tells_how_many_layers_were_tested(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("selftest", "--shards", inputs[0], "--recipe", inputs[1])
    assert "1 layers with random weights;" in train_here(*call, "--layers", 1).stdout
    monkeypatch.setattr(selftest, "_COPIES", 2**60)
    assert "2 layers with random weights (the whole model does not fit)" in train_here(*call).stdout


def test_a_leaking_kernel_fails_with_exit_code_6(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole_row(
        _module: Any, query: Any, key: Any, value: Any, _mask: Any, **_options: Any
    ) -> Any:
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(attention.FUNCTIONS, "per_sequence", whole_row)
    done = train_here("selftest", "--shards", inputs[0], "--recipe", inputs[1])
    assert done.exit_code == 6
    failed = {row.split("  ")[0] for row in done.stdout.splitlines() if row.endswith("FAILED")}
    assert failed == {"neighbours", "later tokens", "packed = alone", "gradients alone", "split"}
    assert "selftest failed: neighbours" in done.stderr


def findings_of(shards: Path) -> dict[str, bool]:
    shard_set = open_shard_set(shards)
    model = build_model(
        ModelConfig(config=MODEL),
        shard_set.manifest,
        attention=register_attention("per_sequence"),
        dtype=torch.float32,
        seed=1,
    )
    findings = selftest.measure(
        model, [selftest.every_target(shard_set.pack(index), 30) for index in (0, 1)]
    )
    return {finding.check: finding.is_ok for finding in findings}


def test_a_wrong_loss_kernel_fails(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(findings_of(inputs[0]).values())

    def off_by_little(
        hidden: Any, head: Any, targets: Any, _weights: Any, *, uniform: float
    ) -> torch.Tensor:
        return (
            torch.nn.functional.cross_entropy(hidden @ head.t() * 1.01, targets, reduction="sum")
            * uniform
        )

    monkeypatch.setattr(selftest, "weighted_cross_entropy", off_by_little)
    assert [check for check, is_ok in findings_of(inputs[0]).items() if not is_ok] == [
        "loss kernel"
    ]


def test_a_loss_that_depends_on_the_split_fails(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LossModel.forward
    monkeypatch.setattr(
        LossModel, "forward", lambda self, batch: forward(self, batch) / len(batch.rows)
    )
    assert not findings_of(inputs[0])["split"]
