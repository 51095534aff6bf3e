"""Feed-forward layers in tiles have the same loss and gradients, and keep no wide activation of a
whole row."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shared.errors import ConfigError
from train.model.tiled_mlp import tile_mlps

TABLE = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def network(model_type: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TABLE))


def loss_and_gradients(model: Any, num_tokens: int) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.arange(num_tokens)[None] % 61
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "qwen3"])
@pytest.mark.parametrize(("tiles", "num_tokens"), [(2, 24), (3, 25), (7, 5)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tiles_change_no_loss_and_no_gradient(
    model_type: str, tiles: int, num_tokens: int, checkpointing: bool
) -> None:
    tiled = network(model_type).train()
    tile_mlps(tiled, tiles)
    if checkpointing:
        tiled.gradient_checkpointing_enable({"use_reentrant": False})
    (loss, gradients), (expected, plain) = (
        loss_and_gradients(model, num_tokens) for model in (tiled, network(model_type).train())
    )
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6)


def kept_for_backward(model: Any) -> int:
    """Return the size of the largest tensor that the forward pass keeps, without the head."""
    sizes = [0]

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() if tensor.dim() > 2 else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.model(input_ids=torch.arange(60)[None], use_cache=False)
    return max(sizes)


def test_no_activation_of_a_whole_row_is_kept() -> None:
    tiled = network("llama").train()
    tile_mlps(tiled, 4)
    assert kept_for_backward(network("llama").train()) >= 60 * 96
    assert kept_for_backward(tiled) < 60 * 96


def test_a_model_without_mlp_layers_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", num_hidden_layers=1))
    with pytest.raises(ConfigError, match="no layers named mlp"):
        tile_mlps(model, 2)
