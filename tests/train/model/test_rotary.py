"""Rotary angles that depend on a length: a pack still trains as its sequences do alone."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from rope_models import MODELS, VOCAB, make
from transformers import AutoConfig, AutoModelForCausalLM

from shared.shard_reader import Pack
from train.data.micro_batch import MicroBatch, make_micro_batch
from train.data.sequence_slice import take_slice
from train.model.model import LossModel
from train.model.rotary import separate_rotary

LENGTHS = {
    "short-then-long": [9, 40, 5, 16, 17],
    "long-then-short": [17, 16, 5, 40, 9],
    "short-only": [9, 16, 3],
    "long-only": [33, 21],
}


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
    """Loss and gradient of each sequence in a fresh, unmodified model with eager attention."""
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


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return |actual - expected| / |expected| of the whole gradient."""
    off = sum(
        float((actual[name] - gradient).double().square().sum())
        for name, gradient in expected.items()
    )
    size = sum(float(gradient.double().square().sum()) for gradient in expected.values())
    return float((off / size) ** 0.5)


def take_gradients(model: LossModel) -> dict[str, torch.Tensor]:
    gradients = {
        name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_a_pack_with_short_and_long_sequences_trains_as_they_do_alone(
    name: str, order: str
) -> None:
    packs = [pack_of(LENGTHS[order]), pack_of(LENGTHS[order][::-1], seed=1)]  # two in a micro-batch
    model = LossModel(make(name)).eval()
    for _ in range(2):  # the second step must not depend on the first
        loss = model(batch_of(packs))
        loss.backward()
        gradients = take_gradients(model)
        expected_loss, expected = alone(name, packs)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
        assert distance(gradients, expected) <= 1e-5


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
    gradients = take_gradients(model)
    _, expected = alone(
        name, [pack_of(LENGTHS["short-then-long"]), pack_of(LENGTHS["short-only"], seed=3)]
    )
    assert distance(gradients, expected) <= 1e-5


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic", "olmo3-mixed"])
def test_slices_of_a_row_get_the_angles_of_the_whole_row(name: str, size: int) -> None:
    """A slice may lack the end of its sequences, so their lengths come from the bounds of the
    row."""
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
    """Register attention that returns its values, since a slice has the bounds of the whole row."""
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


@pytest.mark.parametrize("name", ["llama-yarn", "llama-llama3"])
def test_fixed_frequencies_are_left_alone(name: str) -> None:
    """Separate calls would cost a wait for the device in every step."""
    assert separate_rotary(make(name)) is None


def test_a_model_without_rotary_embeddings_is_left_alone() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB)
    assert separate_rotary(AutoModelForCausalLM.from_config(config)) is None


@pytest.mark.parametrize(
    ("lengths", "calls"), [([9, 16, 3], 1), ([9, 40, 5, 40], 2), ([17, 18], 2)]
)
def test_all_sequences_up_to_the_original_length_share_one_call(
    lengths: list[int], calls: int
) -> None:
    """Each call makes the host wait for the device."""
    network = make("phi3-longrope")
    rotary = network.base_model.rotary_emb
    forward, positions = rotary.forward, []

    def counted(hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        positions.append(position_ids)
        return forward(hidden, position_ids)

    rotary.forward = counted
    LossModel(network)(batch_of([pack_of(lengths)]))
    assert len(positions) == calls
