"""At the start of a run: does this type of model keep sequences apart with this attention kernel?

A list of model types would never be complete, but what a model does to a pack shows in its outputs.
A few layers of its architecture with random weights, with few heads of the real size, run a pack of
three sequences (train/selftest/isolation.py). That takes well under a second, so nothing is cached.
Positions are compared up to the longest sequence of the set by a cheaper method
(train/selftest/positions.py), 32,768 tokens of a narrow model in some seconds on a CPU.

Every rank checks alone, before weights are sharded (ZeRO-3). No random state changes.
"""

import logging
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from shared.errors import ConfigError
from train.model.model import CANNOT_BUILD, check_head, check_supported
from train.model.rotary import separate_rotary
from train.selftest.isolation import Finding, isolation_of
from train.selftest.positions import MOST_TOKENS, position_check, register_local

logger = logging.getLogger(__name__)

# Sequences that are longer than the window below and not aligned to any tile.
_BOUNDS = [0, 40, 71, 131]
_WINDOW = 24
_VOCABULARY = 256
# Weights x tokens of the check of positions: some seconds on two cores.
_MOST_PRODUCTS = 2**34
_ORIGINAL = "original_max_position_embeddings"
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_isolation(
    config: PretrainedConfig,
    attention: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    longest: int = 0,
) -> None:
    """Raise ConfigError, with the measurement, if a pack would not train as its sequences do alone.

    `longest`: tokens of the longest sequence of the set. Positions are compared up to there or to
    `MOST_TOKENS`, and always past the original length of a model whose context was extended.
    """
    check_supported(config)
    for finding in probe(config, attention, device=device, dtype=dtype, longest=longest):
        if not finding.is_ok:
            raise ConfigError(
                f"model type {config.model_type!r} with attention"
                f" {attention.removeprefix('sft_')!r} fails the check {finding.check!r}:"
                f" {finding.measurement} moved by {finding.worst:.2g} of their size, expected at"
                f" most {finding.tolerance:g}. Sequences of a pack would not train as they do"
                " alone; use another model.attention, or a model whose layers see other tokens only"
                " through attention"
            )
        logger.debug("%s: %s moved by %.1e", finding.check, finding.measurement, finding.worst)


def probe(
    config: PretrainedConfig,
    attention: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    longest: int = 0,
) -> list[Finding]:
    """Return how a small model of the type of `config` treats a pack. Raises ConfigError if it
    cannot be built or run."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, _VOCABULARY, (_BOUNDS[-1],), generator=generator).to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        network = _build(config, attention, dtype=dtype).to(device)
        check_head(network)
        separate_rotary(network)
        try:
            findings = isolation_of(network, ids, _BOUNDS)
        except torch.OutOfMemoryError:
            raise
        except CANNOT_BUILD as exc:
            raise ConfigError(
                f"model type {config.model_type!r} cannot run a pack of sequences:"
                f" {type(exc).__name__}: {exc}; use another model"
            ) from exc
        # Positions are compared up to the longest sequence of the set, or less if that would take
        # too long. Angles may change at an original length, so one token beyond it must be compared
        # if the set has longer sequences.
        num_weights = sum(parameter.numel() for parameter in network.parameters())
        limit = min(MOST_TOKENS, _MOST_PRODUCTS // num_weights)
        originals = _original_lengths(config.to_dict())
        beyond = [length + 1 for length in originals if limit <= length < longest]
        length = max([min(longest, limit), *beyond])
        if length > _BOUNDS[-1] - _BOUNDS[-2]:
            local = register_local()
            plain = _build(config, local, dtype=torch.float32).to(device)
            packed = _build(config, local, dtype=torch.float32).to(device)
            packed.load_state_dict(plain.state_dict())
            separate_rotary(packed)
            findings.append(position_check(packed, plain, longest=length))
    return findings


def _original_lengths(values: dict[str, Any]) -> list[int]:
    """Return every original length in a config, however deep."""
    lengths = []
    for key, value in values.items():
        if isinstance(value, dict):
            lengths += _original_lengths(value)
        elif key == _ORIGINAL and isinstance(value, int):
            lengths.append(value)
    return lengths


def _build(config: PretrainedConfig, attention: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return a narrow model, or one of full width if the widths of its type depend on one another
    in an unknown way."""
    problem: Exception | None = None
    for narrow in (True, False):
        try:
            small = small_config(config, narrow=narrow)
            network = AutoModelForCausalLM.from_config(
                small, attn_implementation=attention, dtype=dtype
            )
        except torch.OutOfMemoryError:
            raise
        except CANNOT_BUILD as exc:
            problem = exc
            continue
        assert isinstance(network, PreTrainedModel)
        if not narrow:
            logger.info(
                "attention is checked on layers of full width, since narrow ones cannot be built"
                " (%s)",
                problem,
            )
        return network
    raise ConfigError(
        f"model type {config.model_type!r} cannot be checked for leaks between the sequences of a"
        f" pack, since a model of few layers cannot be built: {problem}; use another model"
    ) from problem


def small_config(config: PretrainedConfig, *, narrow: bool = True) -> PretrainedConfig:
    """Return a config of few and narrow layers, with at least one of each kind.

    Heads keep their size, on which kernels depend, and the number of query heads per key head. Each
    token goes to all of a few experts, since a choice among many would depend on rounding.
    """
    values = with_layers(config.to_dict(), 2)
    if narrow:
        _make_narrow(values)
    experts_per_token = values.get("num_experts_per_tok")
    for key in _EXPERT_COUNTS:
        if isinstance(values.get(key), int) and isinstance(experts_per_token, int):
            values[key] = min(values[key], experts_per_token)
    if isinstance(values.get("sliding_window"), int):
        values["sliding_window"] = min(values["sliding_window"], _WINDOW)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        values[key] = None
    values["vocab_size"] = _VOCABULARY
    model_type = values.pop("model_type")
    small = AutoConfig.for_model(model_type, **values)
    assert isinstance(small, PretrainedConfig)
    return small


def _make_narrow(values: dict[str, Any]) -> None:
    heads, key_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(values.get("hidden_size"), int):
        # Two key heads (one if there is one), and as many query heads per key head as before.
        few = 2 if not isinstance(key_heads, int) or key_heads > 1 else 1
        few_heads = few * (heads // key_heads) if isinstance(key_heads, int) else few
        if few_heads < heads:
            values["hidden_size"] = values["hidden_size"] // heads * few_heads
            values["num_attention_heads"] = few_heads
            if isinstance(key_heads, int):
                values["num_key_value_heads"] = few
    for key in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(values.get(key), int):
            values[key] = min(values[key], 128)


def with_layers(values: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return config values with `num_layers` layers, or more to have one of each kind.

    Layers are of the same kind if all lists of the config with an entry per layer agree on them.
    """
    count = values.get("num_hidden_layers")
    if not isinstance(count, int):
        return values
    lists = {
        key: value
        for key, value in values.items()
        if isinstance(value, list) and len(value) == count
    }
    # The first layer of each kind, then the first of the others.
    kinds: dict[str, int] = {}
    for index in range(count):
        kinds.setdefault(repr([value[index] for value in lists.values()]), index)
    first = [*kinds.values()]
    others = [index for index in range(count) if index not in first]
    indices = sorted(first + others[: max(0, num_layers - len(first))])
    return {
        **values,
        "num_hidden_layers": len(indices),
        **{key: [value[index] for index in indices] for key, value in lists.items()},
    }
