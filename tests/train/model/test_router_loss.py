"""The load balancing loss is that of transformers, with a weight, and not part of the logged
loss."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_sets import random_packs, write_shard_set
from train_runs import VOCAB, records, train_apart, train_here, write_inputs
from transformers import AutoConfig, AutoModelForCausalLM

from shared.shard_reader import ShardSet, open_shard_set
from train.config import ModelConfig
from train.data.micro_batch import make_micro_batch
from train.model.attention import register_attention
from train.model.model import build_model
from train.model.router_loss import load_balancing_loss

TABLES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
    },
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
WEIGHT = 0.5


@pytest.mark.parametrize("model_type", TABLES)
def test_the_loss_is_that_of_transformers(model_type: str) -> None:
    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(40, 4, generator=generator) for _ in range(3))
    expected = module.load_balancing_loss_func(logits, 4, 2, None)
    torch.testing.assert_close(load_balancing_loss(logits, top_k=2), expected)
    even = (torch.zeros(8, 4) + 1e-6 * torch.eye(4).repeat(2, 1),)
    assert load_balancing_loss(even, top_k=1).item() == pytest.approx(1.0, rel=1e-3)


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    packs = random_packs(num_packs=1, max_seq_len=20, vocab_size=VOCAB)
    alone = [[packs[0][0]]]
    path = tmp_path_factory.mktemp("moe") / "set"
    return open_shard_set(write_shard_set(path, alone, max_seq_len=20, vocab_size=VOCAB))


@pytest.mark.parametrize("model_type", TABLES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_one_sequence_is_that_of_transformers(
    model_type: str, checkpointing: bool, shard_set: ShardSet
) -> None:
    config = ModelConfig(
        config={"model_type": model_type, **SMALL, **TABLES[model_type]},
        gradient_checkpointing=checkpointing,
    )
    built = build_model(
        config,
        shard_set.manifest,
        attention=register_attention("per_sequence"),
        dtype=torch.float32,
        seed=1,
        balancing_weight=WEIGHT,
    )
    pack = shard_set.pack(0)
    count = int(pack.loss_mask.sum())
    weights = [torch.full((count,), 1 / count).numpy()]
    batch = replace(make_micro_batch([pack], weights, uniform_weight=1 / count), token_share=1.0)
    balancing = torch.zeros(1)
    loss = built(batch, None, balancing)
    loss.backward()
    settings = {
        key: value for key, value in built.model.config.to_dict().items() if key != "model_type"
    }
    settings = {**settings, "router_aux_loss_coef": WEIGHT, "attn_implementation": "eager"}
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    plain.load_state_dict(built.model.state_dict())
    ids = torch.from_numpy(pack.tokens.astype("int64"))[None]
    labels = torch.where(torch.from_numpy(pack.loss_mask)[None] == 1, ids, -100)
    output = plain(input_ids=ids, labels=labels, output_router_logits=True, use_cache=False)
    output.loss.backward()
    torch.testing.assert_close(loss, output.loss)
    torch.testing.assert_close(balancing[0], output.aux_loss)
    expected = dict(plain.named_parameters())
    for name, parameter in built.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5)


def moe_inputs(folder: Path) -> tuple[Path, Path]:
    shards, recipe = write_inputs(folder)
    router = 'model_type = "olmoe"\nnum_experts = 4\nnum_experts_per_tok = 2'
    text = recipe.read_text().replace('model_type = "llama"', router)
    recipe.write_text(text.replace("attention_dropout = 0.1", ""))
    return shards, recipe


def test_the_logged_loss_leaves_it_out(tmp_path: Path) -> None:
    shards, recipe = moe_inputs(tmp_path)
    call = (
        "--shards",
        shards,
        "--recipe",
        recipe,
        "--max-steps",
        4,
        "--set",
        "schedule.warmup_ratio=1.0",
    )
    assert train_here(*call, "--output", tmp_path / "off").exit_code == 0
    on = ("--set", "loss.load_balancing_weight=0.5", "--output", tmp_path / "on")
    assert train_here(*call, *on).exit_code == 0
    off, with_it = records(tmp_path / "off"), records(tmp_path / "on")
    # Before the first update the weights are the same.
    assert with_it[0]["train_loss"] == pytest.approx(off[0]["train_loss"], rel=1e-6)
    assert with_it[0]["grad_norm"] != off[0]["grad_norm"]
    assert [record["load_balancing_loss"] for record in off] == [None] * 4
    assert all(record["load_balancing_loss"] >= 1.9 for record in with_it)


@pytest.mark.slow
def test_two_ranks_of_zero_3_learn_what_one_learns(tmp_path: Path) -> None:
    """With the same micro-batches: one pack each."""
    shards, recipe = moe_inputs(tmp_path)
    call = ("--shards", shards, "--recipe", recipe, "--set", "loss.load_balancing_weight=0.5")
    assert train_here(*call, "--output", tmp_path / "one").exit_code == 0
    done = train_apart(*call, "--output", tmp_path / "two", "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert two["load_balancing_loss"] == pytest.approx(one["load_balancing_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.load_balancing_weight=0.1", "has no router"),
        ("loss.load_balancing_weight=-1", "expected 0 or more"),
    ],
)
def test_a_model_without_a_router_is_refused(setting: str, message: str, tmp_path: Path) -> None:
    shards, recipe = write_inputs(tmp_path)
    done = train_here(
        "--shards", shards, "--recipe", recipe, "--output", tmp_path / "run", "--set", setting
    )
    assert done.exit_code == 3
    assert message in done.output
