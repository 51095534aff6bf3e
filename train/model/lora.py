"""Low-rank adapters: the weights of the model are frozen, small matrices beside them are trained.

    y = W x + (alpha / rank) B A x      A [rank, in] random, B [out, rank] zero

(Hu et al. 2021, section 4.1.) peft inserts the matrices. After training they are either added to
the weights (`merged`) or written as an adapter, which peft and inference servers load beside the
base model. Checkpoints and messages between ranks hold the adapters only.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from shared.errors import ArtifactError, ConfigError, PrerequisiteError
from train.config import LoraConfig, ModelConfig, TrainConfig
from train.model.new_tokens import is_new_rows, layer_of, with_rows

_ADAPTER = "default"
_MATRIX = re.compile(rf"^(?P<layer>.+)\.lora_(?P<which>[AB])\.{_ADAPTER}\.weight$")
_EVERY_LINEAR_LAYER = "all-linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    """What adapters belong to: their base model, and how they are trained and exported."""

    model: ModelConfig
    lora: LoraConfig


def adapted_by(recipe: TrainConfig) -> Adapted | None:
    """Return what the adapters of `recipe` belong to; None if it trains the weights themselves."""
    return Adapted(model=recipe.model, lora=recipe.lora) if recipe.lora.is_on else None


def add_adapters(network: PreTrainedModel, lora: LoraConfig, *, seed: int) -> None:
    """Freeze `network` and add adapters to its layers, in place; all ranks get the same values.

    Raises PrerequisiteError without peft and ConfigError for targets that cannot have an adapter.
    """
    try:
        import peft
    except ImportError as exc:
        raise PrerequisiteError(
            "[lora] needs the package peft; install it, or remove the table"
        ) from exc
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or _EVERY_LINEAR_LAYER,
        bias="none",
        task_type="CAUSAL_LM",
    )
    network.requires_grad_(False)
    # peft draws the matrices A from the global generator.
    torch.manual_seed(seed)
    expected = _expected_targets(network, lora)
    try:
        peft.inject_adapter_in_model(settings, network, adapter_name=_ADAPTER)
    except (ValueError, AttributeError, TypeError) as exc:
        # No adapter fits, for instance beside a whole block.
        reason = " ".join(str(exc).split())[:120]
        raise ConfigError(f"lora.targets = {list(lora.targets)}: {reason}; {expected}") from exc
    # Some adapters would not train or not be exported: the loss reads the matrix of the LM head and
    # nothing beside it, an embedding's adapter has other names, and the weight of another kind of
    # layer (GPT-2's Conv1D) is not [out, in].
    head = network.get_output_embeddings()
    for name, layer in network.named_modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, torch.nn.Module) and (layer is head or not _is_linear(base)):
            kind = "the LM head" if layer is head else f"of type {type(base).__name__}"
            raise ConfigError(
                f"lora.targets = {list(lora.targets)}: {name} is {kind}, which cannot have an"
                f" adapter; {expected}"
            )


def _expected_targets(network: PreTrainedModel, lora: LoraConfig) -> str:
    """Return a description of valid targets. Raises ConfigError for a target that names no layer,
    which peft would ignore."""
    names = [name for name, _ in network.named_modules()]
    head = network.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, part in network.named_modules()
        if _is_linear(part) and part is not head
    }
    expected = (
        f"expected names of linear layers of {type(network).__name__}:"
        f" {', '.join(sorted(linear)) or 'there are none'}"
    )
    # Like peft, compare a target with the last parts of the names of layers.
    for target in lora.targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ConfigError(
                f"lora.targets = {list(lora.targets)}: {target!r} is not a layer; {expected}"
            )
    return expected


def adapter_weights(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the trained entries of a state dict: the matrices of adapters and the rows of new
    tokens."""
    return {
        name: tensor
        for name, tensor in state_dict.items()
        if _MATRIX.match(name) or is_new_rows(name)
    }


def merge_adapters(
    base: dict[str, torch.Tensor],
    adapters: dict[str, torch.Tensor],
    *,
    scale: float,
    new_ids: Sequence[int] = (),
) -> dict[str, torch.Tensor]:
    """Return `base` with W + scale B A, computed in fp32, for each W that has an adapter, and with
    the rows of `new_ids`.

    Raises ArtifactError for an adapter that lacks a matrix or its base weight.
    """
    merged = dict(base)
    for name in filter(is_new_rows, adapters):
        grown = f"{layer_of(name)}.weight"
        merged[grown] = with_rows(base[grown], adapters[name], new_ids[0])
    for layer, (a, b) in _pairs(adapters).items():
        name = f"{layer}.weight"
        if name not in base:
            raise ArtifactError(
                f"there is an adapter for {name}, but the base model has no weight of this name"
            )
        weight = base[name]
        # In fp32: rounding B A to bf16 before the sum would lose small updates.
        merged[name] = (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)
    return merged


def merged_model(
    model: ModelConfig,
    lora: LoraConfig,
    adapters: dict[str, torch.Tensor],
    *,
    new_ids: Sequence[int] = (),
) -> tuple[dict[str, torch.Tensor], PretrainedConfig]:
    """Return the weights of the base model with `adapters` added to them, on the CPU, and its
    config.

    The base is read from `model.name` again in its original dtype, even if training held it in 4
    bits.
    """
    base = AutoModelForCausalLM.from_pretrained(
        model.name, revision=model.revision, trust_remote_code=False, dtype="auto"
    )
    if any(map(is_new_rows, adapters)):
        base.config.vocab_size = max(base.config.vocab_size, new_ids[-1] + 1)
    return (
        merge_adapters(base.state_dict(), adapters, scale=scale_of(lora), new_ids=new_ids),
        base.config,
    )


def write_adapter(
    folder: Path,
    adapters: dict[str, torch.Tensor],
    *,
    lora: LoraConfig,
    model: ModelConfig,
    new_ids: Sequence[int] = (),
) -> None:
    """Write adapter_model.safetensors and adapter_config.json as peft reads them.

    peft writes rows of new tokens into a base model whose embedding was resized to hold them.
    """
    # peft expects names below base_model.model, without the name of the adapter.
    weights = {}
    for name, tensor in adapters.items():
        name_in_peft = (
            f"{layer_of(name)}.token_adapter.trainable_tokens_delta"
            if is_new_rows(name)
            else name.replace(f".{_ADAPTER}.", ".")
        )
        weights[f"base_model.model.{name_in_peft}"] = tensor.contiguous()
    rows = {
        layer_of(name).rpartition(".")[2]: list(new_ids) for name in filter(is_new_rows, adapters)
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "revision": model.revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in _pairs(adapters)}),
        "bias": "none",
        "inference_mode": True,
        **({"trainable_token_indices": rows} if rows else {}),
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def scale_of(lora: LoraConfig) -> float:
    """Return alpha / rank, the factor of the adapters' product."""
    return lora.alpha / lora.rank


def quantization(lora: LoraConfig, dtype: torch.dtype) -> Any:
    """Return the transformers config that loads frozen weights in 4 bits (QLoRA, Dettmers et al.
    2023), or None.

    Raises PrerequisiteError without bitsandbytes.
    """
    if lora.quantize == "none":
        return None
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise PrerequisiteError(
            f"lora.quantize = {lora.quantize!r} needs the package bitsandbytes; install it"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=lora.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _pairs(adapters: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return layer name -> (A, B)."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapters.items():
        if is_new_rows(name):
            continue
        match = _MATRIX.match(name)
        if match is None:
            raise ArtifactError(
                f"{name} is no matrix of an adapter; expected LAYER.lora_A.{_ADAPTER}.weight or"
                " lora_B"
            )
        halves.setdefault(match["layer"], {})[match["which"]] = tensor
    for layer, pair in halves.items():
        if len(pair) != 2:
            raise ArtifactError(f"the adapter of {layer} has one matrix; expected A and B")
    return {layer: (pair["A"], pair["B"]) for layer, pair in sorted(halves.items())}


def _is_linear(part: torch.nn.Module) -> bool:
    return isinstance(part, torch.nn.Linear)
