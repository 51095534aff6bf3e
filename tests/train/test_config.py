"""Keys of a recipe: a fixed set, each read by something; bad values are refused."""

import ast
import dataclasses
import typing
from pathlib import Path

import pytest

from shared.errors import ConfigError
from train import config
from train.config import TrainConfig
from train.recipe_file import load_recipe

PACKAGE = Path(config.__file__).parent

KEYS = [
    "batch.conversations_per_step",
    "batch.packs_per_micro_batch",
    "batch.packs_per_step",
    "batch.tokens_per_step",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "engine.dtype",
    "engine.hpz_partition_size",
    "engine.nvme_path",
    "engine.offload_optimizer",
    "engine.offload_params",
    "engine.quantized_gradients",
    "engine.quantized_weights",
    "engine.sequence_parallel",
    "engine.zero_stage",
    "eval.every_steps",
    "eval.max_packs",
    "log.every_steps",
    "log.spike_sigma",
    "log.wandb",
    "log.wandb_name",
    "log.wandb_project",
    "lora.alpha",
    "lora.dropout",
    "lora.export",
    "lora.quantize",
    "lora.rank",
    "lora.targets",
    "loss.divisor",
    "loss.load_balancing_weight",
    "loss.norm",
    "model.attention",
    "model.check_tokenizer",
    "model.config",
    "model.gradient_checkpointing",
    "model.mlp_tiles",
    "model.name",
    "model.resize_vocab",
    "model.revision",
    "name",
    "optim.betas",
    "optim.eps",
    "optim.learning_rate",
    "optim.max_grad_norm",
    "optim.weight_decay",
    "run.hang_timeout_minutes",
    "run.max_skipped",
    "run.on_non_finite",
    "run.seed",
    "schedule.epochs",
    "schedule.kind",
    "schedule.max_steps",
    "schedule.warmup_ratio",
]


def keys_of(cls: type, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(cls)
    keys = []
    for field in dataclasses.fields(cls):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            keys += keys_of(inner, f"{prefix}{field.name}.")
        else:
            keys.append(prefix + field.name)
    return keys


def test_the_set_of_keys_changes_only_on_purpose() -> None:
    assert sorted(keys_of(TrainConfig)) == sorted(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_read_outside_the_config(key: str) -> None:
    name = key.rpartition(".")[2]
    attributes = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if path.name != "config.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert name in attributes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.learning_rate=0", "learning_rate = 0.0; expected more than 0"),
        ("optim.betas=[0.9, 1.0]", "betas"),
        ("optim.weight_decay=-1", "weight_decay"),
        ("schedule.warmup_ratio=2", "warmup_ratio"),
        ("schedule.epochs=0", "epochs"),
        (
            "batch.tokens_per_step=64",
            "set one of packs_per_step, tokens_per_step and conversations_per_step",
        ),
        (
            "batch.conversations_per_step=8",
            "found packs_per_step and conversations_per_step. To replace",
        ),
        ("batch={}", "found none"),
        ("loss.divisor=128", "only norm = 'sum' has one"),
        ("loss={norm='sum', divisor=0}", "divisor = 0.0; expected more than 0"),
        ("batch.packs_per_micro_batch=0", "packs_per_micro_batch = 0"),
        ("checkpoint.keep_last=0", "keep_last = 0"),
        ("log.every_steps=0", "every_steps = 0"),
        ("model.mlp_tiles=0", "mlp_tiles = 0; expected 1 or more"),
        ("model.name=gpt2", "model.name and model.config are both set"),
        ("name=a/b", "expected a plain file name"),
        ("engine.zero_stage=4", 'expected one of "auto", 0, 1, 2, 3'),
    ],
)
def test_a_bad_value_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("tiny", (setting,))
