"""Recipes: strict, frozen, every key read by something, every shipped one valid."""

import ast
import dataclasses
import typing
from pathlib import Path

import pytest

from shared.errors import ConfigError
from train import config
from train.config import TrainConfig
from train.recipe_file import load_recipe, shipped_recipes

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
    found = []
    for field in dataclasses.fields(cls):
        inner = hints[field.name]
        found += (
            keys_of(inner, f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(inner)
            else [prefix + field.name]
        )
    return found


def test_the_set_of_keys_changes_only_on_purpose() -> None:
    assert sorted(keys_of(TrainConfig)) == sorted(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_read_outside_the_config(key: str) -> None:
    name = key.rpartition(".")[2]
    read = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if path.name != "config.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert name in read


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_is_named_after_its_file(name: str) -> None:
    assert load_recipe(name).name == name


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    recipe = load_recipe(
        "tiny", ("optim.learning_rate=1", "loss.norm=sum"), model="some/model", max_steps=7
    )
    assert recipe.optim.learning_rate == 1.0
    assert recipe.loss.norm == "sum"
    assert recipe.schedule.max_steps == 7
    assert recipe.model.name == "some/model"
    assert recipe.model.config is None


def test_a_model_directory_is_found_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "r.toml"
    file.write_text(
        'name = "r"\n[model]\nname = "mine"\n[optim]\nlearning_rate = 1\n[batch]\npacks_per_step'
        " = 1\n"
    )
    monkeypatch.chdir("/")
    assert load_recipe(str(file)).model.name == str(tmp_path / "mine")
    assert load_recipe(str(file), model="org/name").model.name == "org/name"


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
