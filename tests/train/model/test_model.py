"""A pack gives what its sequences give alone: logits, loss and gradients, in fp32 within 2e-5 of
the largest value."""

from pathlib import Path

import numpy as np
import pytest
import torch
from shard_sets import random_packs, write_shard_set

from shared.errors import ConfigError
from shared.shard_reader import Pack, ShardSet, open_shard_set
from train.config import ModelConfig
from train.data.micro_batch import make_micro_batch
from train.model.attention import register_attention
from train.model.model import LossModel, build_model

VOCAB = 61
TOLERANCE = 2e-5

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": {"model_type": "llama", **COMMON},
    "olmo2": {"model_type": "olmo2", **COMMON},
    "qwen3": {"model_type": "qwen3", **COMMON, "head_dim": 8},
    "qwen3-tied": {"model_type": "qwen3", **COMMON, "head_dim": 8, "tie_word_embeddings": True},
    "mistral-window": {"model_type": "mistral", **COMMON, "head_dim": 8, "sliding_window": 5},
    "granite": {"model_type": "granite", **COMMON, "logits_scaling": 3.0},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        **COMMON,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
    },
    "cohere": {"model_type": "cohere", **COMMON, "logit_scale": 0.25},
}


@pytest.fixture
def shard_set(tmp_path: Path) -> ShardSet:
    packs = random_packs(num_packs=3, max_seq_len=40, vocab_size=VOCAB, seed=3)
    return open_shard_set(
        write_shard_set(tmp_path / "set", packs, max_seq_len=40, vocab_size=VOCAB)
    )


def tiny_model(table: dict[str, object], shard_set: ShardSet, **changes: object) -> LossModel:
    config = ModelConfig(config=table, **changes)  # type: ignore[arg-type]
    attention = register_attention("per_sequence")
    return build_model(config, shard_set.manifest, attention=attention, dtype=torch.float32, seed=1)


def ones(pack: Pack) -> np.ndarray:
    return np.ones(int(pack.loss_mask.sum()), np.float32)


def alone_loss(model: LossModel, packs: list[Pack], attention: str) -> torch.Tensor:
    """The loss of plain transformers, one sequence at a time, with attention of its own."""
    network = model.model
    network.set_attn_implementation(attention)
    total = torch.zeros(())
    for pack in packs:
        for start, end in zip(pack.seq_offsets, pack.seq_offsets[1:], strict=False):
            ids = torch.tensor(pack.tokens[start:end].astype(np.int64))[None]
            mask = torch.tensor(pack.loss_mask[start:end].astype(bool))
            logits = network(input_ids=ids, use_cache=False).logits[0]
            losses = torch.nn.functional.cross_entropy(
                logits[:-1].float(), ids[0, 1:], reduction="none"
            )
            total = total + losses[mask[1:]].sum()
    return total


@pytest.mark.parametrize("name", MODELS)
def test_packed_loss_and_gradients_equal_each_sequence_alone(
    name: str, shard_set: ShardSet
) -> None:
    model = tiny_model(MODELS[name], shard_set)
    packs = [shard_set.pack(index) for index in range(3)]
    packed = model(make_micro_batch(packs, [ones(pack) for pack in packs], uniform_weight=1.0))
    packed.backward()
    gradients = {
        key: parameter.grad.clone()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    alone = alone_loss(model, packs, "eager")
    alone.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)
    assert len(gradients) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = parameter.grad.abs().max().clamp(min=1e-3)
        assert ((gradients[key] - parameter.grad).abs().max() / scale).item() < TOLERANCE, key


def test_a_changed_sequence_leaves_its_neighbours_alone(shard_set: ShardSet) -> None:
    model = tiny_model(MODELS["llama"], shard_set).eval()
    batch = make_micro_batch([shard_set.pack(0)], [ones(shard_set.pack(0))], uniform_weight=1.0)
    first_end = int(batch.cu_seqlens[1])

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        bounds, longest = batch.cu_seqlens, batch.max_seqlen
        return model.model.base_model(
            input_ids=ids,
            position_ids=batch.position_ids,
            use_cache=False,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=longest,
            max_length_k=longest,
        ).last_hidden_state[0]

    changed = batch.input_ids.clone()
    changed[0, :first_end] = (changed[0, :first_end] + 7) % VOCAB
    before, after = hidden(batch.input_ids), hidden(changed)
    assert torch.equal(before[first_end:], after[first_end:])
    assert not torch.equal(before[:first_end], after[:first_end])


def test_gradient_checkpointing_changes_no_gradient(shard_set: ShardSet) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(MODELS["llama"], shard_set, gradient_checkpointing=checkpointing)
        model(
            make_micro_batch([shard_set.pack(0)], [ones(shard_set.pack(0))], uniform_weight=1.0)
        ).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert checkpointed is not None
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("packs", [0, 1])
def test_a_micro_batch_without_loss_sends_one_weightless_row_through_model_and_head(
    packs: int, shard_set: ShardSet
) -> None:
    model = tiny_model(MODELS["llama"], shard_set)
    pack = shard_set.pack(0)
    masked = Pack(pack.tokens, np.zeros_like(pack.loss_mask), pack.seq_offsets, pack.seq_origin)
    batch = make_micro_batch(
        [masked][:packs], [np.zeros(0, np.float32)][:packs], uniform_weight=0.5
    )
    assert batch.rows.tolist() == [0]
    loss = model(batch)
    loss.backward()
    assert loss.item() == 0.0
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model_type": "gemma2", **COMMON, "head_dim": 8}, "changes its logits"),
        ({"model_type": "llama", **COMMON, "hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"model_type": "nonsense"}, "not a model type"),
        ({"model_type": "llama", **COMMON, "vocab_size": 10}, r"resize_vocab = true"),
        ({"model_type": "llama", **COMMON, "max_position_embeddings": 8}, "takes 8 positions"),
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1}, "mamba"),
        ({"model_type": "phi", **COMMON}, "no plain LM head"),
        ({"model_type": "recurrent_gemma", **COMMON}, "layers of type recurrent"),
        ({"model_type": "qwen3_next", **COMMON}, "layers of type linear_attention"),
        ({"model_type": "bloom"}, "does not let its attention be replaced"),
        ({"model_type": "llama", **COMMON, "num_attention_heads": 5}, "model.config"),
    ],
)
def test_a_model_that_would_not_train_exactly_is_refused(
    table: dict[str, object], message: str, shard_set: ShardSet
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_model(table, shard_set)


def test_resize_vocab_grows_the_embedding_to_the_tokenizer(shard_set: ShardSet) -> None:
    model = tiny_model({**MODELS["llama"], "vocab_size": 10}, shard_set, resize_vocab=True)
    assert model.model.get_input_embeddings().weight.shape[0] == VOCAB
    assert model.model.config.vocab_size == VOCAB
