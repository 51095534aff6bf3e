"""One gradient whatever the split: ranks x micro-batches against one plain PyTorch batch, within 1e-6 in fp32."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients_of_a_step import OPTIM, feed_for, load_model
from shard_sets import write_shard_set

from shared.shard_reader import ShardSet, open_shard_set
from train.attention import register_attention
from train.config import ModelConfig
from train.model import build_model

VOCAB = 61
JOBS = (
    "llama:token:4:1:3",
    "llama:token:4:2:auto",
    "qwen3-tied:sample:4:1:auto",
    "llama:token:4:1:2",
    "olmo2:sum:4:1:1",
    "llama:token:3:1:3",  # three packs on two ranks: one micro-batch is empty, another has no loss token
)
TOLERANCE = 1e-6
TABLE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
PROGRAM = Path(__file__).with_name("gradients_of_a_step.py")

Results = list[dict[str, Any]]


def uneven_packs() -> list[list[tuple[list[int], list[int]]]]:
    """Four packs with 40, 3, 25 and 0 loss tokens."""
    rng = np.random.default_rng(5)
    packs = []
    for loss_tokens, lengths in ((40, (30, 14)), (3, (5, 40)), (25, (26,)), (0, (10, 10))):
        sequences, left = [], loss_tokens
        for length in lengths:
            trained = min(left, length - 1)
            left -= trained
            mask = [0] * (length - trained) + [1] * trained
            sequences.append((rng.integers(0, VOCAB, length).tolist(), mask))
        assert left == 0
        packs.append(sequences)
    return packs


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    path = tmp_path_factory.mktemp("uneven") / "set"
    return open_shard_set(write_shard_set(path, uneven_packs(), max_seq_len=48, vocab_size=VOCAB))


@pytest.fixture(scope="module")
def models(shard_set: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, saved, so that all start from the same: made under ZeRO-3 they would be other random numbers."""
    folder = tmp_path_factory.mktemp("models")
    attention = register_attention("per_sequence")
    for kind in ("llama", "olmo2", "qwen3-tied"):
        table = {**TABLE, "model_type": kind.removesuffix("-tied"), "tie_word_embeddings": kind.endswith("-tied")}
        config = ModelConfig(config=table)
        model = build_model(config, shard_set.manifest, attention=attention, dtype=torch.float32, seed=1)
        model.model.save_pretrained(folder / kind)
    return folder


def run_ranks(num_ranks: int, shards: Path, models: Path, out: Path, jobs: tuple[str, ...]) -> Results:
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), str(PROGRAM), str(shards), str(models), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parent.parent)}
    done = subprocess.run([*command, *jobs], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{number}.pt") for number in range(len(jobs))]


@pytest.fixture(scope="module")
def one_rank(shard_set: ShardSet, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(1, shard_set.path, models, tmp_path_factory.mktemp("one") / "out", JOBS)


@pytest.fixture(scope="module")
def two_ranks(shard_set: ShardSet, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(2, shard_set.path, models, tmp_path_factory.mktemp("two") / "out", JOBS)


def plain_torch(shard_set: ShardSet, models: Path, kind: str, norm: str, packs_per_step: int) -> dict[str, Any]:
    """One padded batch of all sequences in fp64, by the model's own forward; the loss by its definition."""
    packs = [shard_set.pack(i) for i in feed_order(shard_set, packs_per_step)]
    samples = [
        (pack.tokens[a:b].astype(np.int64), pack.loss_mask[a:b].astype(bool))
        for pack in packs
        for a, b in zip(pack.seq_offsets, pack.seq_offsets[1:], strict=False)
    ]
    longest = max(len(tokens) for tokens, _ in samples)
    ids = torch.zeros((len(samples), longest), dtype=torch.int64)
    counted = torch.zeros((len(samples), longest), dtype=torch.bool)
    for row, (tokens, mask) in enumerate(samples):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        counted[row, : len(tokens)] = torch.from_numpy(mask)
    model = load_model(models / kind, shard_set, register_attention("per_sequence"))
    network = model.model.double()
    network.set_attn_implementation("eager")
    logits = network(input_ids=ids, use_cache=False).logits[:, :-1]  # causal: padding on the right is never seen
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    counted = counted[:, 1:]
    if norm == "sample":
        with_loss = counted.any(dim=1)
        loss = ((losses * counted).sum(1)[with_loss] / counted.sum(1)[with_loss]).mean()
    else:
        loss = losses[counted].sum() / (counted.sum() if norm == "token" else 1)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.optim.AdamW(model.parameters(), lr=OPTIM.learning_rate, eps=OPTIM.eps, weight_decay=0.0).step()
    weights = {name.removeprefix("model."): p.detach() for name, p in model.named_parameters()}
    return {"loss": loss.item(), "gradients": gradients, "weights": weights}


def feed_order(shard_set: ShardSet, packs_per_step: int) -> list[int]:
    feed = feed_for(shard_set, "token", packs_per_step=packs_per_step, per_micro=1, rank=0, world=1)
    return feed.order.step(0).tolist()


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for what in ("gradients", "weights"):
        for name, tensor in found[what].items():
            if name not in expected[what]:
                assert name == "lm_head.weight"  # tied: the embedding under its second name
                continue
            wanted = expected[what][name]
            gradient = expected["gradients"][name if what == "gradients" else f"model.{name}"]
            error = (tensor.double() - wanted).abs().max() / gradient.abs().max().clamp(min=1.0)
            assert error.item() <= TOLERANCE, (what, name, error.item())
    assert len(found["weights"]) >= len(expected["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("job", range(len(JOBS)), ids=JOBS)
@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_ranks_and_micro_batches_give_the_gradient_of_one_plain_batch(
    ranks: str, job: int, shard_set: ShardSet, models: Path, request: pytest.FixtureRequest
) -> None:
    kind, norm, packs_per_step, *_ = JOBS[job].split(":")
    assert_same(request.getfixturevalue(ranks)[job], plain_torch(shard_set, models, kind, norm, int(packs_per_step)))


@pytest.mark.slow
def test_means_of_micro_batch_means_would_be_noticed(one_rank: Results, shard_set: ShardSet, models: Path) -> None:
    wrong = plain_torch(shard_set, models, "llama", "sample", 4)
    with pytest.raises(AssertionError):
        assert_same(one_rank[0], wrong)
