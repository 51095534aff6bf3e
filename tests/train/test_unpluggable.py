"""A model that cannot be trained is refused before its weights load: foreign attention, heads that
ranks cannot share."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_runs import VOCAB, train_here, write_inputs
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shared.errors import ConfigError
from shared.shard_reader import open_shard_set
from train.config import ModelConfig
from train.engine.sequence_parallel import heads_to_share
from train.model.attention import register_attention
from train.model.model import check_supported, model_config
from train.selftest.startup_check import check_isolation

RECIPE = """
name = "tiny"
[model.config]
model_type = "MODEL_TYPE"
[optim]
learning_rate = 1e-3
[batch]
packs_per_step = 4
"""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "d_model": 64,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "decoder_layers": 2,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.parametrize("model_type", ["falcon", "gptj", "gpt_neo", "stablelm"])
def test_a_type_with_fixed_attention_is_refused_from_its_config(model_type: str) -> None:
    with pytest.raises(ConfigError, match="does not let its attention be replaced"):
        check_supported(AutoConfig.for_model(model_type))


@pytest.mark.parametrize("model_type", ["falcon", "gptj", "gpt_neo"])
def test_a_run_of_such_a_type_ends_with_one_line(model_type: str, tmp_path: Path) -> None:
    shards, recipe = write_inputs(tmp_path, recipe=RECIPE.replace("MODEL_TYPE", model_type))
    for command in ((), ("selftest",)):
        output = () if command else ("--output", tmp_path / "run")
        done = train_here(*command, "--shards", shards, "--recipe", recipe, *output)
        assert done.exit_code == 3
        assert f"model type '{model_type}' does not let its attention be replaced" in done.stderr


@pytest.mark.parametrize("model_type", ["llama4", "gemma3", "mllama", "musicgen", "qwen3_5"])
def test_several_models_in_one_are_refused_from_the_config_alone(
    model_type: str, tmp_path: Path
) -> None:
    """They have no vocab_size, and the parts that the check cannot make small would fill the
    memory."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "model")
    shards, recipe = write_inputs(tmp_path)
    done = train_here(
        "--shards",
        shards,
        "--recipe",
        recipe,
        "--model",
        tmp_path / "model",
        "--output",
        tmp_path / "run",
    )
    assert done.exit_code == 3
    assert f"model type '{model_type}' h" in done.stderr  # holds several models, or has an encoder


@pytest.mark.parametrize("model_type", ["xlnet", "gemma4_assistant", "modernbert-decoder"])
def test_a_type_whose_config_cannot_be_built_is_refused(model_type: str, tmp_path: Path) -> None:
    shards, _ = write_inputs(tmp_path)
    with pytest.raises(ConfigError, match=model_type):
        model_config(
            ModelConfig(config={"model_type": model_type}), open_shard_set(shards).manifest
        )


@pytest.mark.parametrize(
    "model_type", sorted(random.Random(6).sample(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), 10))
)
def test_a_seeded_sample_of_all_types_is_checked_or_refused(
    model_type: str, tmp_path: Path
) -> None:
    """As in a run, from a table of small sizes, if the type has them."""
    shards, _ = write_inputs(tmp_path)
    config = AutoConfig.for_model(model_type)
    keys = config.to_dict().keys() - config.attribute_map.keys()
    table = {"model_type": model_type, **{key: size for key, size in SMALL.items() if key in keys}}
    try:
        small = model_config(ModelConfig(config=table), open_shard_set(shards).manifest)
        attention = register_attention("per_sequence")
        check_isolation(
            small, attention, device=torch.device("cpu"), dtype=torch.float32, longest=32
        )
    except ConfigError as exc:
        assert str(exc)  # noqa: PT017


@pytest.mark.parametrize(
    "model_type", ["bert", "ctrl", "blenderbot", "whisper", "olmo3", "glm4", "apertus"]
)
def test_any_causal_type_is_checked_or_refused(model_type: str) -> None:
    attention = register_attention("per_sequence")
    try:
        check_isolation(
            AutoConfig.for_model(model_type),
            attention,
            device=torch.device("cpu"),
            dtype=torch.float32,
            longest=100,
        )
    except ConfigError as exc:
        assert f"model type '{model_type}'" in str(exc)  # noqa: PT017


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("deepseek_v3", "value heads"),
        ("deepseek_v2", "value heads"),
        ("gpt2", "has no num_key_value_heads"),
    ],
)
def test_heads_that_ranks_cannot_share_are_refused(model_type: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        heads_to_share(AutoConfig.for_model(model_type), 2)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_are_named_when_they_load(value: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).save_pretrained(
        folder
    )
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shards, recipe = write_inputs(tmp_path)
    done = train_here(
        "--shards", shards, "--recipe", recipe, "--model", folder, "--output", tmp_path / "run"
    )
    assert done.exit_code == 5
    assert "hold 1 numbers that are not finite in model.layers.1.mlp.up_proj.weight" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        "hidden_size=0",
        "num_hidden_layers=0",
        "num_attention_heads=0",
        "intermediate_size=0",
        "vocab_size=0",
        "hidden_size=-4",
        "num_key_value_heads=3",
        "num_hidden_layers=-1",
    ],
)
def test_a_model_of_no_size_is_refused_or_runs(change: str, tmp_path: Path) -> None:
    shards, recipe = write_inputs(tmp_path)
    done = train_here(
        "--shards",
        shards,
        "--recipe",
        recipe,
        "--output",
        tmp_path / "run",
        "--max-steps",
        1,
        "--set",
        f"model.config.{change}",
    )
    assert done.exit_code in (0, 3), done.output
    assert done.exit_code == 0 or "error: " in done.stderr
