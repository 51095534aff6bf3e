"""At the start of a run: does this type of model keep sequences apart with this attention kernel?

A few layers of the model's architecture with random weights, with heads of the real size but few of
them, run a pack of three sequences (train/selftest/isolation.py): well under a second beside the
seconds that a start takes, so nothing is cached. A list of model types would never be complete;
what a model does to a pack shows in its outputs. Positions are compared up to the longest sequence
of the set by a cheaper way (train/selftest/positions.py): 32,768 tokens of a narrow model in some
seconds on a CPU, fewer where even a small model is large, and always one token past an original
length that the config states and the set exceeds.

Built before weights are sharded (ZeRO-3), on every rank by itself. No random state changes.
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

_BOUNDS = [0, 40, 71, 131]  # longer than the window below, and not aligned to any tile
_WINDOW = 24
_VOCABULARY = 256
_MOST_PRODUCTS = 2**34  # weights x tokens of the check of positions: some seconds on two cores
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
    """Raise ConfigError if a pack would not train as its sequences alone do, naming what was
    measured.

    `longest`: of the sequences of the set, in tokens. Positions are compared up to there, or to
    `MOST_TOKENS`, and in any case past the original length of a model that was made longer.
    """
    check_supported(config)
    for finding in probe(config, attention, device=device, dtype=dtype, longest=longest):
        if not finding.is_ok:
            raise ConfigError(
                f"model type {config.model_type!r} with attention"
                f" {attention.removeprefix('sft_')!r} fails the check {finding.check!r}:"
                f" {finding.measured} moved by {finding.worst:.2g} of their size, expected at most"
                f" {finding.tolerance:g}. Sequences of a pack would not train as they do alone; use"
                " another model.attention, or a model whose layers see other tokens through"
                " attention only"
            )
        logger.debug("%s: %s moved by %.1e", finding.check, finding.measured, finding.worst)


def probe(
    config: PretrainedConfig,
    attention: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    longest: int = 0,
) -> list[Finding]:
    """Return what a small model of the type of `config` does with a pack. Raises ConfigError if it
    can't be built."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, _VOCABULARY, (_BOUNDS[-1],), generator=generator).to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        network = _build(config, attention, dtype=dtype).to(device)
        check_head(network)
        separate_rotary(network)
        findings = _isolation(network, ids)
        num_weights = sum(parameter.numel() for parameter in network.parameters())
        if (reach := _reach(config, longest, num_weights=num_weights)) > _BOUNDS[-1] - _BOUNDS[-2]:
            findings.append(_positions(config, reach, device=device))
    return findings


def _isolation(network: PreTrainedModel, ids: torch.Tensor) -> list[Finding]:
    """Return what `isolation_of` finds. Raises ConfigError for a model whose forward pass takes no
    such pack."""
    try:
        return isolation_of(network, ids, _BOUNDS)
    except torch.OutOfMemoryError:
        raise
    except CANNOT_BUILD as exc:
        raise ConfigError(
            f"model type {network.config.model_type!r} cannot run a pack of sequences:"
            f" {type(exc).__name__}: {exc}"
        ) from exc


def _positions(config: PretrainedConfig, reach: int, *, device: torch.device) -> Finding:
    local = register_local()
    plain = _build(config, local, dtype=torch.float32).to(device)
    packed = _build(config, local, dtype=torch.float32).to(device)
    packed.load_state_dict(plain.state_dict())
    separate_rotary(packed)
    return position_check(packed, plain, longest=reach)


def _reach(config: PretrainedConfig, longest: int, *, num_weights: int) -> int:
    """Return how long a sequence to compare: the longest of the set, or less where that would take
    long.

    What has original lengths changes there: then one token more, if the set has such sequences.
    """
    limit = min(MOST_TOKENS, _MOST_PRODUCTS // num_weights)
    originals = _originals(config.to_dict())
    beyond = [length + 1 for length in originals if limit <= length < longest]
    return max([min(longest, limit), *beyond])


def _originals(values: dict[str, Any]) -> list[int]:
    found = [value for key, value in values.items() if key == _ORIGINAL and isinstance(value, int)]
    inner = [value for value in values.values() if isinstance(value, dict)]
    return found + [length for value in inner for length in _originals(value)]


def _build(config: PretrainedConfig, attention: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return a narrow model, or for a type whose widths hang on one another in some other way one
    of full width."""
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
                "checked attention on layers of full width: narrow ones cannot be built (%s)",
                problem,
            )
        return network
    raise ConfigError(
        f"model type {config.model_type!r} cannot be checked for leaks between the sequences of a"
        f" pack, a model of few layers cannot be built: {problem}"
    ) from problem


def small_config(config: PretrainedConfig, *, narrow: bool = True) -> PretrainedConfig:
    """Return a config of few and narrow layers, one of each kind at least.

    Heads keep their size, on which kernels depend, and query heads their number per key head. Each
    token goes to all of few experts: which of many it goes to would hang on rounding.
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


def with_layers(values: dict[str, Any], wanted: int) -> dict[str, Any]:
    """Return config values with `wanted` layers, or one of each kind that lists in the config tell
    apart."""
    count = values.get("num_hidden_layers")
    if not isinstance(count, int):
        return values
    lists = {
        key: value
        for key, value in values.items()
        if isinstance(value, list) and len(value) == count
    }
    kinds: dict[str, int] = {}
    for index in range(count):
        kinds.setdefault(repr([value[index] for value in lists.values()]), index)
    chosen = sorted(kinds.values())
    chosen += [index for index in range(count) if index not in chosen][
        : max(0, wanted - len(chosen))
    ]
    chosen.sort()
    return {
        **values,
        "num_hidden_layers": len(chosen),
        **{key: [value[index] for index in chosen] for key, value in lists.items()},
    }
