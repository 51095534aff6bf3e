"""`sft-train plan`: its counts are those of the set and the model, and its verdicts follow from
them."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from repository import ROOT
from train_runs import train_here, write_inputs
from transformers import AutoConfig, AutoModelForCausalLM

from shared.shard_reader import open_shard_set
from train.config import LoraConfig
from train.sizing.flops import model_cost
from train.sizing.memory import GIB, Setup, memory_of
from train.sizing.model_size import ModelSize, model_size

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
STATED = ("--rows", 939_343, "--tokens", 460_000_000, "--loss-tokens", 300_000_000)


@pytest.fixture(scope="module")
def llama() -> ModelSize:
    return size_of(LLAMA)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def recipe_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("8b")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA))
    text = (
        'name = "big"\n[model]\nname = "model"\n[optim]\nlearning_rate ='
        " 1e-5\n[batch]\npacks_per_step = 16\n"
    )
    (folder / "big.toml").write_text(text)
    return folder / "big.toml"


def size_of(
    values: dict[str, Any], lora: LoraConfig | None = None, dtype: torch.dtype = torch.bfloat16
) -> ModelSize:
    return model_size(AutoConfig.for_model(**values), lora=lora or LoraConfig(), dtype=dtype)


def setup(**changes: Any) -> Setup:
    settings: dict[str, Any] = {
        "world_size": 8, "zero_stage": 3, "weight_bytes": 2, "tokens": 4096, "micro_batches": 2,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return Setup(**(settings | changes))


def planned(*arguments: object) -> dict[str, Any]:
    result = train_here("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_run_is_that_of_the_shard_set(inputs: tuple[Path, Path]) -> None:
    shards, recipe = inputs
    shard_set = open_shard_set(shards)
    plan = planned("--shards", shards, "--recipe", recipe, "--gpus", 2)
    lengths = [
        int(length) for pack in range(shard_set.num_packs) for length in shard_set.seq_lengths(pack)
    ]
    totals = shard_set.manifest.totals
    assert plan["data"]["squared_lengths"] == sum(length**2 for length in lengths)
    assert plan["data"]["assumptions"] == []
    run = plan["run"]
    assert (run["steps"], run["units_per_step"], run["unit"], run["epochs"]) == (
        8,
        4,
        "pack",
        3.0,
    )  # 30 packs
    assert (run["tokens"], run["loss_tokens"]) == (3 * totals.tokens, 3 * totals.loss_tokens)
    assert run["micro_batches"] == 2


def test_flops_and_parameters_are_those_of_the_real_model(inputs: tuple[Path, Path]) -> None:
    shards, recipe = inputs
    plan = planned("--shards", shards, "--recipe", recipe)
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(config)
    run, squares = plan["run"], 3 * plan["data"]["squared_lengths"]
    flops = model_cost(network).flops(
        tokens=run["tokens"], loss_tokens=run["loss_tokens"], squared_lengths=squares
    )
    assert plan["run"]["flops"] == pytest.approx(flops, rel=1e-12)
    assert plan["model"]["parameters"] == sum(
        parameter.numel() for parameter in network.parameters()
    )


def test_time_and_cost_follow_from_flops(inputs: tuple[Path, Path]) -> None:
    shards, recipe = inputs
    call = (
        "--shards",
        shards,
        "--recipe",
        recipe,
        "--gpus",
        4,
        "--gpu",
        "a100",
        "--mfu",
        0.5,
        "--price",
        3,
    )
    plan = planned(*call)
    seconds = plan["run"]["flops"] * plan["run"]["waiting"] / (4 * 312e12 * 0.5)
    assert plan["time"]["hours"] == pytest.approx(seconds / 3600)
    assert plan["time"]["cost"] == pytest.approx(4 * 3 * seconds / 3600)


def test_a_plan_of_stated_sizes_says_what_it_assumes(recipe_8b: Path) -> None:
    plan = planned(*STATED, "--recipe", recipe_8b)
    assert plan["data"]["shards"] is None
    assert plan["data"]["packs"] == -(-460_000_000 // 4096)
    assert len(plan["data"]["assumptions"]) == 3
    text = train_here("plan", *STATED, "--recipe", recipe_8b).stdout
    assert text.count("assumed: ") == 3
    assert "8.03 B parameters" in text


def test_the_verdict_turns_with_the_number_of_gpus(recipe_8b: Path) -> None:
    one, eight = (planned(*STATED, "--recipe", recipe_8b, "--gpus", gpus) for gpus in (1, 8))
    assert not one["verdict"]["fits"]
    assert eight["verdict"]["fits"]
    assert eight["memory_gib"]["total"] < one["memory_gib"]["total"]
    assert any(change["fits"] and "--gpus" in change["what"] for change in one["changes"])


@pytest.mark.parametrize("gpus", [2, 4])
def test_what_a_plan_advises_comes_true(recipe_8b: Path, gpus: int) -> None:
    call = (*STATED, "--recipe", recipe_8b, "--gpu", "L40S")
    plan = planned(*call, "--gpus", gpus)
    assert not plan["verdict"]["fits"]
    (change,) = (
        change
        for change in plan["changes"]
        if change["what"] == "model.gradient_checkpointing=true"
    )
    after = planned(*call, "--gpus", gpus, "--set", change["what"])
    assert after["memory_gib"]["total"] == pytest.approx(change["gib"])
    assert after["verdict"]["fits"] == change["fits"]


def test_offload_is_advised_with_what_the_host_needs(recipe_8b: Path) -> None:
    plan = planned(*STATED, "--recipe", recipe_8b, "--gpus", 2)
    (change,) = (change for change in plan["changes"] if "offload_optimizer=cpu" in change["what"])
    assert change["host_gib"] == pytest.approx(16 * plan["model"]["parameters"] / 2 / GIB)
    assert all(change["gib"] < plan["memory_gib"]["total"] for change in plan["changes"])
    assert (
        "GiB of the host for each GPU"
        in train_here("plan", *STATED, "--recipe", recipe_8b, "--gpus", 2).stdout
    )


def test_a_batch_that_does_not_divide_is_said_with_what_does(recipe_8b: Path) -> None:
    result = train_here("plan", *STATED, "--recipe", recipe_8b, "--gpus", 64)
    assert result.exit_code == 0
    assert "does not run" in result.stdout.splitlines()[0]
    assert "16 packs per step do not divide over 64 ranks" in result.stdout
    assert "use 64 packs per step, or 1, 2, 4, 8, 16 ranks" in result.stdout
    assert "command:" not in result.stdout
    batch = "batch={conversations_per_step=134}"
    assert f"--set '{batch}'" in result.stdout
    plan = planned(*STATED, "--recipe", recipe_8b, "--gpus", 64, "--set", batch)
    assert plan["verdict"]["runs"]
    assert plan["run"]["waiting"] > 1.5  # two conversations a rank


def test_the_command_given_is_one_that_sft_train_takes(recipe_8b: Path) -> None:
    plan = planned(*STATED, "--recipe", recipe_8b, "--gpus", 16)
    assert plan["command"].startswith("sft-train launch --nodes 2 --gpus-per-node 8 --slurm")
    assert planned(*STATED, "--recipe", recipe_8b, "--gpus", 4)["command"].endswith(
        "--nproc-per-node 4"
    )


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("Give --shards, or all of", ()),
        ("Give --shards, or all of", ("--rows", 3)),
        ("--gpu V1: not known; known are H100 PCIe", (*STATED, "--gpu", "V1")),
        ("--gpus 12 do not fill whole nodes", (*STATED, "--gpus", 12)),
        ("--mfu 1.5; expected", (*STATED, "--mfu", 1.5)),
        ("expected from 1 to --tokens 5", ("--rows", 1, "--tokens", 5, "--loss-tokens", 6)),
    ],
)
def test_what_cannot_be_planned_is_refused(
    recipe_8b: Path, message: str, arguments: tuple[object, ...]
) -> None:
    result = train_here("plan", *arguments, "--recipe", recipe_8b)
    assert result.exit_code in (2, 3)
    assert message in result.stderr


def test_a_model_table_without_vocabulary_needs_a_shard_set(inputs: tuple[Path, Path]) -> None:
    result = train_here("plan", *STATED, "--recipe", inputs[1], "--max-seq-len", 32)
    assert result.exit_code == 3
    assert "no vocab_size" in result.stderr


def test_a_llama_layer_keeps_what_the_published_sum_says(llama: ModelSize) -> None:
    """Korthikanti et al. 2022 for SwiGLU, grouped queries, norms in fp32: see
    train/sizing/model_size.py."""
    hidden, wide, heads, key_heads, head = 4096, 14336, 32, 8, 128
    formula = 16 * hidden + 4 * (heads + key_heads) * head + 4 * heads + 8 * wide
    assert llama.layer_bytes == pytest.approx(formula, rel=1e-3)
    assert llama.mlp_bytes == pytest.approx(8 * wide, rel=0.1)


@pytest.mark.parametrize("model_type", ["olmo2", "qwen3", "mistral", "mixtral"])
def test_other_architectures_are_counted_too(model_type: str) -> None:
    size = size_of({**LLAMA, "model_type": model_type, "num_hidden_layers": 2})
    assert size.num_layers == 2
    assert size.layer_bytes > 100_000


def test_adapters_train_alone() -> None:
    size = size_of({**LLAMA, "num_hidden_layers": 2}, LoraConfig(rank=8))
    assert 0 < size.trained < 0.01 * size.parameters


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_zero3_states_are_those_of_deepspeeds_estimator(llama: ModelSize, gpus: int) -> None:
    memory = memory_of(llama, setup(world_size=gpus))
    _, theirs, layer = estimate_zero3_model_states_mem_needs(
        llama.parameters, 0, gpus, 1, False, False
    )
    assert layer == 0
    assert memory.state == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_zero2_states_are_those_of_deepspeeds_estimator_without_gradients_in_16_bits(
    llama: ModelSize, gpus: int
) -> None:
    """It counts gradients in bf16 and in fp32; ours are summed in fp32 and the others freed at
    once."""
    memory = memory_of(llama, setup(world_size=gpus, zero_stage=2))
    _, theirs = estimate_zero2_model_states_mem_needs(llama.parameters, gpus, 1, False)
    assert memory.state == pytest.approx(theirs - 2 * llama.parameters / gpus, rel=1e-6)


@pytest.mark.parametrize(
    "less",
    [
        {"gradient_checkpointing": True},
        {"tokens": 2048},
        {"world_size": 16},
        {"mlp_tiles": 4},
        {"optimizer_offloaded": True},
        {"params_offloaded": True},
    ],
)
def test_what_saves_memory_does(llama: ModelSize, less: dict[str, Any]) -> None:
    assert memory_of(llama, setup(**less)).total < memory_of(llama, setup()).total


def test_one_rank_has_everything(llama: ModelSize) -> None:
    memory = memory_of(llama, setup(world_size=1, zero_stage=0))
    assert memory.state == 18 * llama.parameters
    assert memory.communication == 0
    assert memory.total > memory.state > 130 * GIB


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_a_shipped_recipe_with_a_model_table_can_be_planned(
    inputs: tuple[Path, Path], name: str
) -> None:
    assert planned("--shards", inputs[0], "--recipe", name, "--gpus", 1)["verdict"]["fits"]


def test_the_commands_on_the_page_are_taken(recipe_8b: Path, inputs: tuple[Path, Path]) -> None:
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    of_shards, of_sizes = re.findall(r"^sft-train plan (.*)$", page, re.MULTILINE)[-2:]
    model = ("--model", recipe_8b.parent / "model")
    plan = planned(*shlex.split(of_sizes), *model)
    assert plan["recipe"] == "tulu3-8b-released"
    assert (plan["gpus"], plan["verdict"]["runs"]) == (64, True)
    words = [
        str(inputs[0]) if word.startswith("data_cache/") else word
        for word in shlex.split(of_shards)
    ]
    assert planned(*words, "--recipe", "tiny")["time"]["cost"] > 0


def test_offload_on_one_rank_is_a_problem_and_not_a_crash(recipe_8b: Path) -> None:
    call = (*STATED, "--recipe", recipe_8b, "--gpus", 1, "--set", "engine.offload_optimizer=cpu")
    assert "needs ZeRO" in planned(*call)["verdict"]["problems"][0]
    stage = planned(*call, "--set", "engine.zero_stage=3")
    assert stage["verdict"]["runs"]
    assert stage["memory_gib"]["optimizer"] == stage["memory_gib"]["gradients"] == 0
