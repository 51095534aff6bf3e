"""`sft-train` on a device that is not the CPU (tests/second_device): the same numbers, and no
unknown wait.

Starting a process takes seconds, so each runs many commands, and the tests look at their results.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import run_all, succeeded
from safetensors.torch import load_file
from shard_sets import random_packs, write_shard_set
from train_runs import RECIPE, VOCAB, records, weights, write_inputs
from transformers import AutoConfig, AutoModelForCausalLM

STEPS, SAVED = 6, 4
DROPOUT = "attention_dropout = 0.1"
# Relative tolerances of losses and gradient norms. In fp32 two CPU kernels compute one formula over
# six steps. bf16 has 8 bits, so 0.4 % per operation; losses are means over tokens, and the device
# has another kernel for attention.
FP32 = 1e-5
BF16 = 1e-3
TABLE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}

Results = dict[str, dict[str, Any]]
Commands = dict[str, list[object]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set, an evaluation set, recipes with dropout and without it, and a model to load."""
    folder = tmp_path_factory.mktemp("second-device")
    write_inputs(folder, recipe=RECIPE.replace(DROPOUT, ""))
    (folder / "dropout.toml").write_text(RECIPE)
    held_out = random_packs(num_packs=3, max_seq_len=32, vocab_size=VOCAB, seed=7)
    write_shard_set(folder / "held-out", held_out, max_seq_len=32, vocab_size=VOCAB)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TABLE)).save_pretrained(
        folder / "base"
    )
    return folder


def run(
    folder: Path,
    where: str,
    name: str,
    *settings: str,
    recipe: str = "tiny",
    more: tuple[object, ...] = (),
) -> Any:
    """Return the command of a run in a new directory that evaluates twice and saves twice."""
    settings = ("log.every_steps=1", f"checkpoint.every_steps={SAVED}", *settings)
    return [
        *(
            "--shards",
            folder / "set",
            "--recipe",
            folder / f"{recipe}.toml",
            "--eval-shards",
            folder / "held-out",
        ),
        *("--output", folder / where / name, "--max-steps", STEPS, *more),
        *(part for setting in settings for part in ("--set", setting)),
    ]


def compared(folder: Path, where: str) -> Commands:
    """Return the commands that run on the device and on the CPU."""
    lora = ("engine.dtype=bf16", "lora.rank=4", "lora.alpha=16")
    return {
        "fp32": run(folder, where, "fp32", "engine.dtype=fp32"),
        "bf16": run(folder, where, "bf16", "engine.dtype=bf16"),
        "sample": run(folder, where, "sample", "engine.dtype=fp32", "loss.norm=sample"),
        "lora": run(
            folder, where, "lora", *lora, "log.every_steps=3", more=("--model", folder / "base")
        ),
    }


def run_in(
    folder: Path, where: str, built: Path | str, commands: Commands, *, num_ranks: int = 1
) -> Results:
    (folder / where).mkdir()
    results = run_all(built, list(commands.values()), folder / where, num_ranks=num_ranks)
    return dict(zip(commands, results, strict=True))


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> Path:
    for result in run_in(folder, "cpu", "cpu", compared(folder, "cpu")).values():
        succeeded(result)
    return folder / "cpu"


@pytest.fixture(scope="module")
def one_rank(folder: Path, second_device: Path) -> Results:
    def dropping(name: str, *more: object) -> list[object]:
        command: list[object] = run(
            folder, "one", name, "engine.dtype=fp32", recipe="dropout", more=more
        )
        return command

    def of_set(dtype: str) -> list[object]:
        return [
            "--shards",
            folder / "set",
            "--recipe",
            folder / "tiny.toml",
            "--set",
            f"engine.dtype={dtype}",
        ]

    halves = run(folder, "one", "bf16-resumed", "engine.dtype=bf16")
    commands = {
        **compared(folder, "one"),
        "bf16-stopped": [*halves, "--stop-after", 3],
        "bf16-resumed": halves,
        "dropout": dropping("dropout"),
        "dropout-stopped": dropping("dropout-resumed", "--stop-after", 3),
        "dropout-resumed": dropping("dropout-resumed"),
        "export": [
            "export",
            folder / f"one/bf16/checkpoints/step-0000000{SAVED}",
            folder / "one/exported",
        ],
        "selftest-fp32": ["selftest", *of_set("fp32")],
        "selftest-bf16": ["selftest", *of_set("bf16")],
    }
    return run_in(folder, "one", second_device, commands)


@pytest.fixture(scope="module")
def two_ranks(folder: Path, second_device: Path) -> Results:
    commands = {
        "fp32": run(folder, "two", "fp32", "engine.dtype=fp32"),
        "bf16": run(folder, "two", "bf16", "engine.dtype=bf16"),
        "bf16-stopped": run(
            folder, "two", "bf16-resumed", "engine.dtype=bf16", more=("--stop-after", 3)
        ),
        "bf16-resumed": run(folder, "two", "bf16-resumed", "engine.dtype=bf16"),
        "stage-1": run(folder, "two", "stage-1", "engine.dtype=bf16", "engine.zero_stage=1"),
    }
    return run_in(folder, "two", second_device, commands, num_ranks=2)


def numbers(run: Path) -> list[tuple[int, str, float]]:
    """Return step, key and value of the numbers in which two runs of one training agree."""
    keys = ("train_loss", "grad_norm", "eval_loss")
    return [
        (record["step"], key, record[key])
        for record in records(run)
        for key in keys
        if key in record
    ]


def assert_equal_within(tolerance: float, run: Path, expected: Path) -> None:
    """A gradient norm may differ ten times as much: it is no mean over tokens, so roundings do not
    cancel."""
    for (step, key, value), (_, _, other) in zip(numbers(run), numbers(expected), strict=True):
        allowed = tolerance * (10 if key == "grad_norm" else 1)
        assert value == pytest.approx(other, rel=allowed), (step, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tolerance"), [("fp32", FP32), ("sample", FP32), ("bf16", BF16), ("lora", BF16)]
)
def test_one_rank_trains_and_evaluates_as_on_the_cpu(
    name: str, tolerance: float, folder: Path, one_rank: Results, on_cpu: Path
) -> None:
    """A bf16 run once failed at its first backward pass: masters were made before the weights moved
    to the device."""
    succeeded(one_rank[name])
    assert len(numbers(folder / "one" / name)) >= 6
    assert_equal_within(tolerance, folder / "one" / name, on_cpu / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [("fp32", "fp32", FP32), ("bf16", "bf16", BF16), ("stage-1", "bf16", BF16)],
)
def test_two_ranks_train_and_evaluate_as_one_on_the_cpu(
    name: str, reference: str, tolerance: float, folder: Path, two_ranks: Results, on_cpu: Path
) -> None:
    """ZeRO-3, and stage 1, with DeepSpeed's CUDA accelerator."""
    assert f"ZeRO stage {1 if name == 'stage-1' else 3}" in succeeded(two_ranks[name])["output"]
    assert_equal_within(tolerance, folder / "two" / name, on_cpu / reference)


MICRO_BATCHES, EVALUATED, LAYERS = 4 * STEPS, 2 * 3, 2
ALWAYS = {"metrics_window.read: copy to the host": STEPS, "evaluate.evaluate: copy to the host": 2}
# Every wait of a run for its device, except for those of saving. The program waits once per logging
# window and once per evaluation; all others are DeepSpeed's (ZeRO) and cannot be avoided. A new
# wait must be worth it.
WAITS = {
    ("one", "bf16"): ALWAYS,
    # After steps 3 and 6, and for the checkpoint.
    ("one", "lora"): {**ALWAYS, "metrics_window.read: copy to the host": 3},
    ("one", "fp32"): {
        **ALWAYS,
        # torch has no fp32 kernel for rows of several sequences, so the host needs their bounds.
        "attention.per_sequence: copy to the host": LAYERS * (MICRO_BATCHES + EVALUATED),
    },
    ("two", "bf16"): {
        **ALWAYS,
        "utils.is_invalid_grad_norm: aten::_local_scalar_dense": STEPS,
        "stage3.get_grad_norm_direct: copy to the device": 2 * STEPS,
        "cuda_accelerator.synchronize: torch.cuda.synchronize": STEPS + 1,
        "stage3.independent_gradient_partition_epilogue: Stream.synchronize": MICRO_BATCHES // 2,
        # While the first step is traced.
        "utils.get_lst_from_rank0: copy to the device": 4,
        "utils.get_lst_from_rank0: copy to the host": 4,
        "utils.assert_lst_len_same_as_other_ranks: copy to the device": 4,
        "utils.assert_lst_len_same_as_other_ranks: copy to the host": 4,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name"), WAITS)
def test_the_host_never_waits_more_often_than_listed(
    ranks: str, name: str, one_rank: Results, two_ranks: Results
) -> None:
    """Liger's function around its kernel waits in each micro-batch."""
    calls = succeeded((one_rank if ranks == "one" else two_ranks)[name])["waits"]
    waits: Counter[str] = Counter()
    for kind, entry, caller, times in calls:
        if entry != "checkpoint.save_checkpoint":
            waits[f"{caller}: {kind}"] += times
    assert waits == WAITS[ranks, name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "dropout"])
def test_a_stopped_run_resumes_bit_for_bit(name: str, folder: Path, one_rank: Results) -> None:
    """Masters, moments and the random generator of the device are restored."""
    assert one_rank[f"{name}-stopped"]["exit_code"] == 75
    succeeded(one_rank[f"{name}-resumed"])
    whole, resumed = folder / "one" / name, folder / "one" / f"{name}-resumed"
    assert numbers(whole) == numbers(resumed)
    assert all(torch.equal(tensor, weights(resumed)[key]) for key, tensor in weights(whole).items())


@pytest.mark.slow
def test_a_stopped_run_of_two_ranks_resumes_bit_for_bit(folder: Path, two_ranks: Results) -> None:
    assert two_ranks["bf16-stopped"]["exit_code"] == 75
    succeeded(two_ranks["bf16-resumed"])
    whole, resumed = folder / "two/bf16", folder / "two/bf16-resumed"
    assert numbers(whole) == numbers(resumed)
    assert all(torch.equal(tensor, weights(resumed)[key]) for key, tensor in weights(whole).items())


@pytest.mark.slow
def test_exports_hold_the_trained_weights(
    folder: Path, one_rank: Results, two_ranks: Results, on_cpu: Path
) -> None:
    succeeded(one_rank["export"])
    assert (
        load_file(folder / "one/exported/model.safetensors").keys()
        == weights(on_cpu / "bf16").keys()
    )
    for run_dir in (folder / "one/fp32", folder / "two/fp32"):
        for key, tensor in weights(on_cpu / "fp32").items():
            torch.testing.assert_close(weights(run_dir)[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_selftest_passes(dtype: str, one_rank: Results) -> None:
    output = succeeded(one_rank[f"selftest-{dtype}"])["output"]
    assert "cuda" in output
    assert "FAILED" not in output
