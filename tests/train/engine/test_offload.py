"""Offloading on a CPU learns the same, DeepSpeed gets the settings, and invalid ones are refused.

ZeRO++ and offloading to disks do not run here: quantised collectives need GPUs, and disks need a
compiled library.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import losses, train_apart, train_here, write_inputs

from train.config import EngineConfig, OptimConfig
from train.engine.engine import deepspeed_config

NO_DROPOUT = ("--set", "model.config.attention_dropout=0.0")

Inputs = tuple[Path, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def arguments(inputs: Inputs, run: Path, *settings: str) -> list[object]:
    flags = [part for setting in settings for part in ("--set", setting)]
    return ["--shards", inputs[0], "--recipe", inputs[1], "--output", run, *NO_DROPOUT, *flags]


@pytest.fixture(scope="module")
def plain(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    run = tmp_path_factory.mktemp("plain") / "run"
    assert train_here(*arguments(inputs, run)).exit_code == 0
    return losses(run)


def assert_same(actual: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [step for step, _ in actual] == [step for step, _ in expected]
    for (_, one), (_, other) in zip(actual, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


CPU = {
    "1": ("engine.zero_stage=1", "engine.offload_optimizer=cpu"),
    "2": ("engine.zero_stage=2", "engine.offload_optimizer=cpu"),
    "3": ("engine.zero_stage=3", "engine.offload_optimizer=cpu"),
    "3, weights": (
        "engine.zero_stage=3",
        "engine.offload_optimizer=cpu",
        "engine.offload_params=cpu",
    ),
}


@pytest.mark.parametrize("settings", CPU.values(), ids=CPU)
def test_offload_learns_the_same_and_may_change_on_resume(
    settings: tuple[str, ...], inputs: Inputs, plain: list[tuple[int, float]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train_here(*arguments(inputs, run, *settings), "--stop-after", 3).exit_code == 75
    assert train_here(*arguments(inputs, run, settings[0]), "--stop-after", 2).exit_code == 75
    assert train_here(*arguments(inputs, run, *settings)).exit_code == 0
    assert_same(losses(run), plain)


@pytest.mark.slow
def test_two_ranks_offload_weights_and_optimizer(
    inputs: Inputs, plain: list[tuple[int, float]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    both = ("engine.offload_optimizer=cpu", "engine.offload_params=cpu")
    done = train_apart(*arguments(inputs, run, *both), "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    assert_same(losses(run), plain)


def test_a_run_cannot_turn_quantised_messages_on_when_it_resumes(
    inputs: Inputs, tmp_path: Path
) -> None:
    """They change the weights."""
    call = arguments(inputs, tmp_path / "run", "engine.zero_stage=3")
    assert train_here(*call, "--stop-after", 1).exit_code == 75
    for name in ("quantized_weights", "quantized_gradients"):
        refused = train_here(*call, "--set", f"engine.{name}=true")
        assert refused.exit_code == 3
        assert name in refused.stderr


def zero_keys(**keys: Any) -> dict[str, Any]:
    config = deepspeed_config(
        3, OptimConfig(learning_rate=1.0), dtype=torch.bfloat16, engine=EngineConfig(**keys)
    )
    zero: dict[str, Any] = config["zero_optimization"]
    return {
        key: value for key, value in zero.items() if "offload" in key or key.startswith("zero_")
    }


def test_deepspeed_gets_the_settings_and_nothing_else() -> None:
    assert zero_keys() == {}
    assert zero_keys(hpz_partition_size=8, quantized_weights=True, quantized_gradients=True) == {
        "zero_hpz_partition_size": 8,
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
    }
    pinned = torch.cuda.is_available()
    assert zero_keys(offload_optimizer="nvme", offload_params="cpu", nvme_path="/disk") == {
        "offload_optimizer": {"device": "nvme", "pin_memory": pinned, "nvme_path": "/disk"},
        "offload_param": {"device": "cpu", "pin_memory": pinned},
    }


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (("engine.offload_optimizer=nvme",), 3, "expected a path if one of them is"),
        (("engine.nvme_path=/tmp",), 3, "expected a path if one of them is"),
        (
            ("engine.zero_stage=2", "engine.offload_params=cpu"),
            3,
            "offload_params with zero_stage = 2",
        ),
        (("engine.zero_stage=1", "engine.hpz_partition_size=2"), 3, "expected zero_stage = 3"),
        (("engine.zero_stage=2", "engine.quantized_weights=true"), 3, "expected zero_stage = 3"),
        (
            ("engine.zero_stage=0", "engine.offload_optimizer=cpu"),
            3,
            "expected one of the stages 1 to 3",
        ),
        (("engine.offload_optimizer=cpu",), 3, "set engine.zero_stage = 3"),
        (
            ("engine.quantized_gradients=true",),
            3,
            "needs ZeRO, which a single rank does not use by default",
        ),
        (
            ("engine.zero_stage=3", "engine.hpz_partition_size=2"),
            3,
            "hpz_partition_size = 2 does not divide 1 ranks",
        ),
        (("engine.hpz_partition_size=0",), 3, "hpz_partition_size = 0; expected 1 or more"),
        (
            ("engine.zero_stage=3", "engine.quantized_weights=true"),
            6,
            "quantized_weights needs GPUs",
        ),
        (
            (
                "engine.zero_stage=3",
                "engine.offload_optimizer=nvme",
                "engine.nvme_path=/no/such/folder",
            ),
            3,
            "nvme_path = '/no/such/folder' is not a directory",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: tuple[str, ...], code: int, message: str, inputs: Inputs, tmp_path: Path
) -> None:
    done = train_here(*arguments(inputs, tmp_path / "run", *settings))
    assert done.exit_code == code, done.output
    assert message in done.output
