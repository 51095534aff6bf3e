"""One gradient for every split of a step: the engine in fp32 against one padded batch in plain
PyTorch in fp64, within 1e-6.

The split is over ranks, micro-batches and packs per micro-batch, packed or one sample per pack,
steps of packs or of conversations, with loss tokens spread very unevenly.
"""

import os
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients_of_a_step import OPTIM, Job, load_model, order_for, to_json
from repository import ROOT, TESTS
from shard_sets import write_shard_set

from shared.shard_reader import open_shard_set
from train.config import LossConfig, ModelConfig
from train.model.attention import register_attention
from train.model.model import build_model

# Two processes start DeepSpeed.
pytestmark = pytest.mark.slow

VOCAB, MAX_SEQ_LEN = 61, 48
TOLERANCE = 1e-6
TABLE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
PROGRAM = TESTS / "builders" / "gradients_of_a_step.py"
TOKEN, SAMPLE, SUM = LossConfig(norm="token"), LossConfig(norm="sample"), LossConfig(norm="sum")

# Tokens and loss mask.
Sequence = tuple[list[int], list[int]]
Results = dict[Job, dict[str, Any]]


def jobs_of(num_ranks: int) -> list[Job]:
    """Jobs that share an engine stand together."""
    split = [
        Job(
            per_step=num_ranks * accumulation * per_micro_batch,
            per_micro_batch=per_micro_batch,
            shards=shards,
            loss=loss,
        )
        for accumulation, per_micro_batch, shards, loss in product(
            (1, 2, 4), (1, 2), ("packed", "alone"), (TOKEN, SAMPLE, SUM)
        )
    ]
    conversations = [
        Job(unit="conversation", per_step=per_step, per_micro_batch=per_micro_batch, loss=loss)
        for per_step, per_micro_batch, loss in product(
            (2, 12, 23), (1, 2), (TOKEN, SAMPLE, LossConfig(norm="sum", divisor=12.0))
        )
    ]
    # Three packs on two ranks: one micro-batch is empty.
    uneven = [Job(per_step=3), Job(per_step=5, per_micro_batch=2, loss=SAMPLE)]
    four = 4 * num_ranks
    others = [
        Job(model="llama", checkpointing=True, per_step=four, per_micro_batch=2, loss=TOKEN),
        Job(model="llama", checkpointing=True, per_step=four, loss=SAMPLE),
        Job(model="qwen3-tied", per_step=four, per_micro_batch=2, loss=TOKEN),
        Job(model="qwen3-tied", per_step=four, loss=SAMPLE),
        Job(model="qwen3-tied", per_step=11, unit="conversation", loss=SAMPLE),
        Job(model="llama", zero_stage=3, per_step=four, loss=TOKEN),
        Job(model="llama", zero_stage=2, per_step=four, loss=TOKEN),
        Job(model="olmo2", zero_stage=1, per_step=four, loss=SUM),
        Job(model="olmo2", zero_stage=2, per_step=17, unit="conversation", loss=SAMPLE),
    ]
    return split + conversations + uneven + others


LIGER_JOBS = [
    Job(kernel="liger", zero_stage=3, per_step=4, per_micro_batch=2, loss=TOKEN),
    Job(kernel="liger", zero_stage=3, per_step=4, loss=SUM),
    Job(kernel="liger", per_step=4, loss=SAMPLE),
    Job(
        kernel="liger", unit="conversation", per_step=12, loss=LossConfig(norm="sum", divisor=12.0)
    ),
]
WORLDS = {"one_rank": jobs_of(1), "two_ranks": jobs_of(2), "liger": LIGER_JOBS}
CASES = [(world, job) for world, jobs in WORLDS.items() for job in jobs]


def name_of(case: object) -> str:
    if not isinstance(case, Job):
        return str(case)
    step = f"{case.per_step}{case.unit}s-by{case.per_micro_batch}"
    checkpointing = "-checkpointing" if case.checkpointing else ""
    return (
        f"{case.model}-{case.shards}-{case.loss.norm}-{step}-zero{case.zero_stage}{checkpointing}"
    )


@cache
def uneven_packs() -> list[list[Sequence]]:
    """Sixteen packs; of a sequence all tokens are trained, or some, or one, or none."""
    rng = np.random.default_rng(5)
    packs = []
    for number in range(16):
        room, sequences = MAX_SEQ_LEN - int(rng.integers(0, 6)), []
        while room >= 4:
            length = int(min(room, rng.integers(4, 30)))
            trained = (length - 1, 1, length // 3, 0)[(len(sequences) + number) % 4]
            mask = [0] * (length - trained) + [1] * trained
            sequences.append((rng.integers(0, VOCAB, length).tolist(), mask))
            room -= length
        packs.append(sequences)
    return packs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets with the same sequences, and models: under ZeRO-3 other random weights would be
    drawn."""
    path = tmp_path_factory.mktemp("inputs")
    alone = [[sequence] for pack in uneven_packs() for sequence in pack]
    for name, packs in (("packed", uneven_packs()), ("alone", alone)):
        write_shard_set(path / "sets" / name, packs, max_seq_len=MAX_SEQ_LEN, vocab_size=VOCAB)
    manifest = open_shard_set(path / "sets" / "packed").manifest
    attention = register_attention("per_sequence")
    for kind in ("llama", "olmo2", "qwen3-tied"):
        tied = {"tie_word_embeddings": kind.endswith("-tied")}
        config = ModelConfig(config={**TABLE, "model_type": kind.removesuffix("-tied"), **tied})
        model = build_model(config, manifest, attention=attention, dtype=torch.float32, seed=1)
        model.model.save_pretrained(path / "models" / kind)
    return path


def run_ranks(
    num_ranks: int, folder: Path, out: Path, jobs: list[Job], **environment: str
) -> Results:
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    launcher = launcher if num_ranks > 1 else []
    command = [sys.executable, *launcher, str(PROGRAM), str(folder), str(out)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [*command, to_json(jobs)], capture_output=True, text=True, env=variables, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {job: torch.load(out / f"{number}.pt") for number, job in enumerate(jobs)}


@pytest.fixture(scope="module")
def one_rank(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(1, folder, tmp_path_factory.mktemp("one") / "out", WORLDS["one_rank"])


@pytest.fixture(scope="module")
def two_ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(2, folder, tmp_path_factory.mktemp("two") / "out", WORLDS["two_ranks"])


@pytest.fixture(scope="module")
def liger(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """In a process of its own: the interpreter must be chosen before triton is imported."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("liger") / "out"
    return run_ranks(1, folder, out, LIGER_JOBS, TRITON_INTERPRET="1")


def samples_of(folder: Path, job: Job) -> list[Sequence]:
    """The samples of the job's step, taken from what the sets were written from."""
    packs = uneven_packs()
    if job.unit == "conversation" or job.shards == "alone":
        packs = [[sequence] for pack in packs for sequence in pack]
    ids = order_for(open_shard_set(folder / "sets" / job.shards), job).step(0).tolist()
    return [sequence for number in ids for sequence in packs[number]]


def plain_torch(folder: Path, job: Job) -> dict[str, Any]:
    """One padded batch of all samples in fp64, by the model's own forward; the loss by its
    definition."""
    samples = samples_of(folder, job)
    longest = max(len(tokens) for tokens, _ in samples)
    ids = torch.zeros((len(samples), longest), dtype=torch.int64)
    counted = torch.zeros((len(samples), longest), dtype=torch.bool)
    for row, (tokens, mask) in enumerate(samples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        counted[row, : len(tokens)] = torch.tensor(mask, dtype=torch.bool)
    shard_set = open_shard_set(folder / "sets" / "packed")
    model = load_model(folder / "models" / job.model, shard_set, register_attention("per_sequence"))
    network = model.model.double()
    network.set_attn_implementation("eager")
    # The model is causal: padding on the right is never seen.
    logits = network(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    loss = normalised(losses, counted[:, 1:], job.loss)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.optim.AdamW(
        model.parameters(),
        lr=OPTIM.learning_rate,
        betas=OPTIM.betas,
        eps=OPTIM.eps,
        weight_decay=0.0,
    ).step()
    weights = {name.removeprefix("model."): p.detach() for name, p in model.named_parameters()}
    return {"loss": loss.item(), "gradients": gradients, "weights": weights}


def normalised(losses: torch.Tensor, counted: torch.Tensor, loss: LossConfig) -> torch.Tensor:
    """The definitions: mean over loss tokens; mean over samples with loss of their means; sum /
    divisor."""
    if loss.norm == "sample":
        with_loss = counted.any(dim=1)
        means = (losses * counted).sum(1)[with_loss] / counted.sum(1)[with_loss]
        return means.sum() / max(1, int(with_loss.sum()))
    divisor = counted.sum().clamp(min=1) if loss.norm == "token" else loss.divisor
    return losses[counted].sum() / divisor


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for what in ("gradients", "weights"):
        for name, tensor in result.get(what, {}).items():
            if name not in expected[what]:
                # Tied: the embedding under its second name.
                assert name == "lm_head.weight"
                continue
            gradient = expected["gradients"][name if what == "gradients" else f"model.{name}"]
            scale = gradient.abs().max().clamp(min=1.0)
            error = (tensor.double() - expected[what][name]).abs().max() / scale
            assert error.item() <= TOLERANCE, (what, name, error.item())
        assert what not in result or len(result[what]) >= len(expected[what])
    assert "gradients" in result or "weights" in result


@pytest.mark.parametrize(("world", "job"), CASES, ids=name_of)
def test_every_split_gives_the_gradient_of_one_padded_batch(
    world: str, job: Job, folder: Path, request: pytest.FixtureRequest
) -> None:
    expected = plain_torch(folder, job)
    assert max(gradient.abs().max() for gradient in expected["gradients"].values()) > 0.01
    assert_same(request.getfixturevalue(world)[job], expected)


def test_the_jobs_split_steps_as_they_say(one_rank: Results, two_ranks: Results) -> None:
    """The matrix holds one, two and four micro-batches, and conversations that share rows."""
    for results, job_list in ((one_rank, WORLDS["one_rank"]), (two_ranks, WORLDS["two_ranks"])):
        numbers = {results[job]["micro_batches"] for job in job_list if job.unit == "pack"}
        assert {1, 2, 4} <= numbers
    conversations = Job(unit="conversation", per_step=23, loss=TOKEN)
    # A sequence has about 16 tokens.
    rows = one_rank[conversations]["micro_batches"]
    assert rows <= 2 * 23 * 16 / MAX_SEQ_LEN
    assert two_ranks[conversations]["micro_batches"] == -(-rows // 2)


def test_means_of_micro_batch_means_would_be_noticed(one_rank: Results, folder: Path) -> None:
    """Trainers that do not know the denominator of the step compute them; the comparison fails."""
    job = Job(per_step=4, loss=TOKEN)
    packs = [
        uneven_packs()[number]
        for number in order_for(open_shard_set(folder / "sets" / "packed"), job).step(0)
    ]
    per_pack = [sum(sum(mask) for _, mask in pack) for pack in packs]
    assert max(per_pack) > 3 * min(per_pack)
    with pytest.raises(AssertionError):
        assert_same(one_rank[job], plain_torch(folder, Job(per_step=4, loss=SAMPLE)))


def padded_trainer(folder: Path, job: Job) -> dict[str, Any]:
    """What trainers without packing do: each conversation alone, padded, its loss reduced,
    gradients averaged."""
    samples = samples_of(folder, job)
    shard_set = open_shard_set(folder / "sets" / "packed")
    model = load_model(folder / "models" / job.model, shard_set, register_attention("per_sequence"))
    network = model.model.double()
    network.set_attn_implementation("eager")
    with_loss = [sample for sample in samples if any(sample[1])]
    num_averaged = len(samples) if job.loss.norm == "sum" else len(with_loss)
    total = 0.0
    for tokens, mask in with_loss:
        padding = MAX_SEQ_LEN - len(tokens)
        ids = torch.tensor([tokens + [0] * padding])
        labels = ids.where(torch.tensor([mask + [0] * padding], dtype=torch.bool), -100)
        logits = network(input_ids=ids, use_cache=False).logits
        reduction = "sum" if job.loss.norm == "sum" else "mean"
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction=reduction)
        loss = loss / num_averaged
        loss.backward()
        total += loss.item()
    return {
        "loss": total,
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize(
    "loss", [SAMPLE, LossConfig(norm="sum", divisor=12.0)], ids=["sample", "sum"]
)
@pytest.mark.parametrize("world", ["one_rank", "two_ranks"])
def test_conversations_give_the_gradient_of_a_trainer_that_pads_them(
    world: str, loss: LossConfig, folder: Path, request: pytest.FixtureRequest
) -> None:
    """Exactly 12 conversations per step; averaged over accumulation and ranks, one in each
    micro-batch."""
    job = Job(unit="conversation", per_step=12, loss=loss)
    assert len(samples_of(folder, job)) == 12
    assert_same(request.getfixturevalue(world)[job], padded_trainer(folder, job))
