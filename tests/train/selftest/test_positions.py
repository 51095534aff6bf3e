"""Angles of rotary embeddings that hang on the length of a sequence: a pack trains as its sequences
alone do."""

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shared.errors import ConfigError
from shared.shard_reader import Pack
from train.data.micro_batch import MicroBatch, make_micro_batch
from train.data.sequence_slice import take_slice
from train.model.attention import register_attention
from train.model.model import LossModel
from train.selftest import startup_check
from train.selftest.startup_check import check_isolation

VOCAB = 61
ORIGINAL = 16
HEAD = 16
COMMON = {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
BASE = {"rope_theta": 1e4}
LONGROPE = {
    **BASE, "rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, "factor": 4.0,
    "short_factor": [1.0 + index / 8 for index in range(HEAD // 2)],
    "long_factor": [2.0 + 2 * index for index in range(HEAD // 2)],
}  # fmt: skip
DYNAMIC = {**BASE, "rope_type": "dynamic", "factor": 4.0}
YARN = {**BASE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    **BASE, "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "phi3-longrope": {
        "model_type": "phi3", "max_position_embeddings": 64, "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": LONGROPE,
    },
    "llama-longrope": {"model_type": "llama", "max_position_embeddings": 64, "rope_parameters": LONGROPE},
    "llama-dynamic": {"model_type": "llama", "max_position_embeddings": ORIGINAL, "rope_parameters": DYNAMIC},
    "llama-yarn": {"model_type": "llama", "max_position_embeddings": 64, "rope_parameters": YARN},
    "llama-llama3": {"model_type": "llama", "max_position_embeddings": 64, "rope_parameters": LLAMA3},
    "phimoe": {
        "model_type": "phimoe", "max_position_embeddings": 64, "num_local_experts": 2, "num_experts_per_tok": 2,
        "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4},
    },
    "olmo3-mixed": {
        "model_type": "olmo3", "max_position_embeddings": 64, "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": {**BASE, "rope_type": "default"}, "full_attention": LONGROPE},
    },
}  # fmt: skip
LENGTHS = {
    "short-then-long": [9, 40, 5, 16, 17],
    "long-then-short": [17, 16, 5, 40, 9],
    "short-only": [9, 16, 3],
    "long-only": [33, 21],
}


def make(name: str) -> PreTrainedModel:
    values = {**COMMON, **MODELS[name]}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(2)
    network = AutoModelForCausalLM.from_config(
        config, attn_implementation=register_attention("per_sequence")
    )
    assert isinstance(network, PreTrainedModel)
    return network


def pack_of(lengths: list[int], seed: int = 0) -> Pack:
    generator = np.random.default_rng(seed)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    mask = np.ones(bounds[-1], np.uint8)
    mask[bounds[:-1]] = 0
    tokens = generator.integers(0, VOCAB, bounds[-1]).astype(np.int32)
    return Pack(tokens, mask, bounds, np.zeros((len(lengths), 3), np.int64))


def batch_of(packs: list[Pack]) -> MicroBatch:
    weights = [np.ones(int(pack.loss_mask.sum()), np.float32) for pack in packs]
    return make_micro_batch(packs, weights, uniform_weight=1.0)


def alone(name: str, packs: list[Pack]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of every sequence through a fresh, unmodified model with eager
    attention."""
    total, sums = 0.0, dict[str, torch.Tensor]()
    for pack in packs:
        for start, end in pairwise(pack.seq_offsets.tolist()):
            network = make(name).eval()
            network.set_attn_implementation("eager")
            ids = torch.tensor(pack.tokens[start:end].astype(np.int64))[None]
            logits = network(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            loss.backward()
            total += loss.item()
            for key, parameter in network.named_parameters():
                if parameter.grad is not None:
                    sums[key] = sums.get(key, 0) + parameter.grad
    return total, sums


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of the whole gradient: |found - expected| / |expected|."""
    off = sum(
        float((found[name] - gradient).double().square().sum())
        for name, gradient in expected.items()
    )
    return float(
        (off / sum(float(gradient.double().square().sum()) for gradient in expected.values()))
        ** 0.5
    )


def own_gradients(model: LossModel) -> dict[str, torch.Tensor]:
    found = {
        name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    return found


@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_a_pack_with_short_and_long_sequences_trains_as_they_do_alone(
    name: str, order: str
) -> None:
    packs = [pack_of(LENGTHS[order]), pack_of(LENGTHS[order][::-1], seed=1)]  # two in a micro-batch
    model = LossModel(make(name)).eval()
    for _ in range(2):  # nothing is left of the step before
        loss = model(batch_of(packs))
        loss.backward()
        found = own_gradients(model)
        expected_loss, expected = alone(name, packs)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
        assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic", "olmo3-mixed"])
def test_gradient_checkpointing_computes_the_same_angles_again(name: str) -> None:
    model = LossModel(make(name)).train()
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [
        batch_of([pack_of(LENGTHS["short-then-long"])]),
        batch_of([pack_of(LENGTHS["short-only"], seed=3)]),
    ]
    for batch in batches:
        model(batch).backward()
    found = own_gradients(model)
    _, expected = alone(
        name, [pack_of(LENGTHS["short-then-long"]), pack_of(LENGTHS["short-only"], seed=3)]
    )
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic", "olmo3-mixed"])
def test_slices_of_a_row_get_the_angles_of_the_whole_row(name: str, size: int) -> None:
    """A slice may lack the end of its sequences: their lengths come from the bounds of the row."""
    batch = batch_of([pack_of([9, 40, 5, 16, 17])])
    model = LossModel(make(name)).eval()

    def angles(part: MicroBatch) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def stop(module: torch.nn.Module, _arguments: Any, output: Any) -> None:
            seen.extend(output)

        hooks = [
            module.register_forward_hook(stop)
            for path, module in model.model.base_model.named_modules()
            if path.endswith("rotary_emb")
        ]
        with torch.no_grad():
            model(part)
        for hook in hooks:
            hook.remove()
        return seen

    model.model.set_attn_implementation(register_stub())
    whole = angles(batch)
    parts = [angles(take_slice(batch, index, size)) for index in range(size)]
    assert whole
    for index, expected in enumerate(whole):
        joined = torch.cat([part[index] for part in parts], dim=1)[:, : expected.shape[1]]
        torch.testing.assert_close(joined, expected, rtol=0, atol=0)


def register_stub() -> str:
    """Attention that returns its values: a slice's bounds are those of the whole row."""
    from transformers import AttentionInterface

    def stub(
        _m: Any, query: torch.Tensor, _k: Any, value: torch.Tensor, _mask: Any, **_o: Any
    ) -> tuple[Any, None]:
        return (
            value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            .transpose(1, 2)
            .contiguous(),
            None,
        )

    AttentionInterface.register("sft_stub", stub)
    return "sft_stub"


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic", "phimoe", "olmo3-mixed"])
def test_the_check_at_the_start_sees_angles_that_hang_on_the_row(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(name).config
    attention = register_attention("per_sequence")
    check_isolation(config, attention, device=torch.device("cpu"), dtype=torch.float32, longest=200)
    monkeypatch.setattr(startup_check, "separate_rotary", lambda _network: None)
    with pytest.raises(ConfigError, match=r"fails the check '(packed = alone|positions)'"):
        check_isolation(
            config, attention, device=torch.device("cpu"), dtype=torch.float32, longest=200
        )


def test_the_check_at_the_start_goes_past_an_original_length_however_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = copy.deepcopy(make("phi3-longrope").config)
    config.rope_parameters["original_max_position_embeddings"] = 300
    attention = register_attention("per_sequence")
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "longest": 400}
    monkeypatch.setattr(startup_check, "_MOST_PRODUCTS", 1)
    check_isolation(config, attention, **options)
    monkeypatch.setattr(startup_check, "separate_rotary", lambda _network: None)
    with pytest.raises(
        ConfigError,
        match="fails the check 'positions': logits of a pack with a sequence of 301 tokens",
    ):
        check_isolation(config, attention, **options)
