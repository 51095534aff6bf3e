"""Steps, tokens, FLOPs, time and cost of a plan are those of the set and of the real model."""

from pathlib import Path

import pytest
from estimates import planned
from train_runs import write_inputs
from transformers import AutoConfig, AutoModelForCausalLM

from shared.shard_reader import open_shard_set
from train.config import LossConfig
from train.data.loader import StepLoader
from train.estimate.data_size import size_of_shard_set
from train.estimate.run_length import division
from train.run.prepare import TrainRequest, prepare
from train.sizing.flops import model_cost


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_plan_has_the_steps_and_tokens_of_the_run(inputs: tuple[Path, Path]) -> None:
    totals = open_shard_set(inputs[0]).manifest.totals
    run = planned("--shards", inputs[0], "--recipe", inputs[1], "--gpus", 2)["run"]
    assert (run["steps"], run["units_per_step"], run["unit"]) == (8, 4, "pack")
    assert (run["epochs"], run["warmup_steps"]) == (3.0, 2)
    assert (run["tokens"], run["loss_tokens"]) == (3 * totals.tokens, 3 * totals.loss_tokens)


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
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert plan["model"]["parameters"] == parameters


def test_time_and_cost_follow_from_flops(inputs: tuple[Path, Path]) -> None:
    call = ("--shards", inputs[0], "--recipe", inputs[1], "--gpus", 4, "--gpu", "a100")
    plan = planned(*call, "--mfu", 0.5, "--price", 3)
    seconds = plan["run"]["flops"] * plan["run"]["waiting"] / (4 * 312e12 * 0.5)
    assert plan["time"]["hours"] == pytest.approx(seconds / 3600)
    assert plan["time"]["cost"] == pytest.approx(4 * 3 * seconds / 3600)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch", ["{packs_per_step=4}", "{conversations_per_step=9}"])
def test_ranks_share_the_steps_of_a_plan_as_they_do_in_the_run(
    batch: str, world_size: int, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """All eight steps, or fewer, are sampled: micro-batches are those of the loaders."""
    settings = (f"batch={batch}", "schedule.epochs=1")
    request = TrainRequest(
        shards=inputs[0], recipe=str(inputs[1]), output=tmp_path / "run", settings=settings
    )
    run = prepare(request)
    size = size_of_shard_set(run.shard_set)
    shared = division(run.recipe, run.order, size, run.shard_set, world_size=world_size)
    full_steps = run.order.total_units // run.order.units_per_step
    most = 0
    for rank in range(world_size):
        loader = StepLoader(
            shard_set=run.shard_set,
            order=run.order,
            loss=LossConfig(),
            rank=rank,
            world_size=world_size,
            packs_per_micro_batch=1,
        )
        most = max(most, *(len(loader.make(step).micro_batches) for step in range(full_steps)))
    assert shared.micro_batches == most
    assert shared.waiting >= 1.0
    assert (shared.waiting == 1.0) == (world_size == 1)
