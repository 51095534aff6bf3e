"""Only adapters train and are saved, and both exports are the trained model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_runs import losses, train_apart, train_here, write_inputs
from transformers import AutoConfig, AutoModelForCausalLM

from shared.errors import ArtifactError, ConfigError
from train.config import LoraConfig
from train.model.lora import adapter_weights, add_adapters, merge_adapters
from train.model.new_tokens import head_weight

peft = pytest.importorskip("peft")

TABLE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
LORA = ("lora.rank=4", "lora.alpha=16", "optim.learning_rate=0.02")

Inputs = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("lora")
    shards, recipe = write_inputs(folder)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TABLE))
    base.save_pretrained(folder / "base")
    return shards, recipe, folder / "base"


def arguments(inputs: Inputs, run: Path, *settings: str) -> list[object]:
    flags = [part for setting in (*LORA, *settings) for part in ("--set", setting)]
    return [
        "--shards",
        inputs[0],
        "--recipe",
        inputs[1],
        "--model",
        inputs[2],
        "--output",
        run,
        *flags,
    ]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model.eval()(input_ids=torch.arange(20)[None]).logits
    return output


def with_adapter(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_both_exports_are_the_trained_model_and_a_stopped_run_resumes_exactly(
    inputs: Inputs, tmp_path: Path
) -> None:
    whole, adapter = tmp_path / "whole", tmp_path / "adapter"
    assert train_here(*arguments(inputs, whole)).exit_code == 0
    only = ("lora.export=adapter",)
    assert train_here(*arguments(inputs, adapter, *only), "--stop-after", 3).exit_code == 75
    assert train_here(*arguments(inputs, adapter, *only)).exit_code == 0
    assert losses(whole) == losses(adapter)
    assert losses(whole)[-1][1] < losses(whole)[0][1]
    merged = logits(AutoModelForCausalLM.from_pretrained(whole / "model"))
    torch.testing.assert_close(
        logits(with_adapter(inputs[2], adapter / "model")), merged, rtol=1e-4, atol=1e-5
    )
    assert (logits(AutoModelForCausalLM.from_pretrained(inputs[2])) - merged).abs().max() > 0.01
    files = {file.name for file in (adapter / "model").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "README.md",
    } <= files
    assert "model.safetensors" not in files


def test_a_checkpoint_holds_adapters_only_and_exports_to_the_same_model(
    inputs: Inputs, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train_here(*arguments(inputs, run)).exit_code == 0
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    for file in (last / "engine").rglob("*.pt"):
        module = torch.load(file, weights_only=False).get("module", {})
        assert all("lora_" in name for name in module)
    out = tmp_path / "out"
    assert train_here("export", last, out).exit_code == 0
    for name, tensor in load_file(run / "model" / "model.safetensors").items():
        torch.testing.assert_close(load_file(out / "model.safetensors")[name], tensor)


@pytest.mark.slow
def test_two_ranks_of_zero_3_learn_what_one_rank_learns(inputs: Inputs, tmp_path: Path) -> None:
    assert train_here(*arguments(inputs, tmp_path / "one")).exit_code == 0
    done = train_apart(*arguments(inputs, tmp_path / "both"), "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    for (_, one), (_, two) in zip(losses(tmp_path / "one"), losses(tmp_path / "both"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("stage", [0, 2])
def test_frozen_weights_in_4_bits_train_adapters_and_export_a_whole_model(
    stage: int, inputs: Inputs, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    four_bits = ("lora.quantize=nf4", f"engine.zero_stage={stage}")
    assert train_here(*arguments(inputs, tmp_path / "run", *four_bits)).exit_code == 0
    assert losses(tmp_path / "run")[-1][1] < losses(tmp_path / "run")[0][1]
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert saved.keys() == load_file(inputs[2] / "model.safetensors").keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert "quantization_config" not in (tmp_path / "run" / "model" / "config.json").read_text()


def test_adapters_resume_in_another_zero_stage(inputs: Inputs, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_here(*arguments(inputs, whole)).exit_code == 0
    for stage in (0, 3, 2):
        done = train_here(*arguments(inputs, run, f"engine.zero_stage={stage}"), "--stop-after", 2)
        assert done.exit_code == 75, done.output
    assert train_here(*arguments(inputs, run)).exit_code == 0
    for (_, loss), (_, expected) in zip(losses(run), losses(whole), strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)


def test_merging_equals_peft(inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert (
        train_here(*arguments(inputs, run, "lora.export=adapter"), "--max-steps", 5).exit_code == 0
    )
    expected = with_adapter(inputs[2], run / "model").merge_and_unload().state_dict()
    saved = load_file(run / "model" / "adapter_model.safetensors")
    adapters = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in saved.items()
    }
    base = AutoModelForCausalLM.from_pretrained(inputs[2]).state_dict()
    for name, tensor in merge_adapters(base, adapters, scale=4.0).items():
        torch.testing.assert_close(tensor, expected[name])


def test_an_adapter_without_its_second_matrix_or_its_weight_is_refused() -> None:
    half = {"x.lora_A.default.weight": torch.zeros(2, 3)}
    with pytest.raises(ArtifactError, match="expected A and B"):
        merge_adapters({"x.weight": torch.zeros(3, 3)}, half, scale=1.0)
    pair = {**half, "x.lora_B.default.weight": torch.zeros(3, 2)}
    with pytest.raises(ArtifactError, match="no weight of this name"):
        merge_adapters({}, pair, scale=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("lora.targets=['q_prog']",),
            "'q_prog' is not a layer; expected names of linear layers of LlamaForCausalLM: down",
        ),
        # peft would take the target that exists and ignore the other.
        (("lora.targets=['q_proj', 'q_prog']",), "'q_prog' is not a layer"),
        (("lora.targets=['lm_head']",), "lm_head is the LM head, which cannot have an adapter"),
        (
            ("lora.targets=['q_proj', 'embed_tokens']",),
            "model.embed_tokens is of type Embedding, which cannot have an adapter",
        ),
        (
            ("lora.targets=['mlp']",),
            "; expected names of linear layers of LlamaForCausalLM: down_proj",
        ),
        (
            ("lora.quantize=nf4", "engine.zero_stage=3"),
            "ZeRO stage 3 splits them; set engine.zero_stage = 2",
        ),
        (("model.resize_vocab=true",), "[lora] needs existing weights"),
        (("lora.rank=-1",), "rank = -1; expected 0"),
        (("lora.alpha=0",), "alpha = 0"),
        (("lora.dropout=1",), "dropout = 1.0"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused(
    settings: tuple[str, ...], message: str, inputs: Inputs, tmp_path: Path
) -> None:
    done = train_here(*arguments(inputs, tmp_path / "run", *settings))
    assert done.exit_code in (3, 6), done.output
    assert message in done.output


@pytest.mark.parametrize(
    "targets", [(), ("c_attn",), ("lm_head",), ("wte",), ("wpe",), ("c_attn", "lm_head")]
)
def test_only_linear_layers_can_have_adapters(targets: tuple[str, ...]) -> None:
    """GPT-2's weights are [in, out]: merged as [out, in] they would be wrong, and nobody would
    notice if they are square."""
    network = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=1)
    )
    with pytest.raises(ConfigError, match="which cannot have an adapter"):
        add_adapters(network, LoraConfig(rank=2, targets=targets), seed=0)


@pytest.mark.parametrize("targets", [(), ("q_proj",), ("layers.1.mlp.up_proj", "down_proj")])
@pytest.mark.parametrize("tied", [True, False])
def test_every_trained_weight_is_saved_and_reached_by_the_loss(
    targets: tuple[str, ...], tied: bool
) -> None:
    config = AutoConfig.for_model("llama", **TABLE, tie_word_embeddings=tied)
    network = AutoModelForCausalLM.from_config(config)
    add_adapters(network, LoraConfig(rank=2, targets=targets), seed=0)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == adapter_weights(network.state_dict()).keys()
    hidden = network.base_model(input_ids=torch.arange(9)[None]).last_hidden_state
    (hidden @ head_weight(network).t()).square().sum().backward()
    assert {
        name for name, parameter in network.named_parameters() if parameter.grad is not None
    } == trained


def test_adapters_without_a_rank_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    done = train_here(*arguments(inputs, tmp_path / "run", "lora.rank=0", "lora.export=adapter"))
    assert done.exit_code == 3
    assert "rank = 0 trains none" in done.output
