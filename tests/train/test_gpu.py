"""What only a GPU can show: its kernels, and that a step waits for nothing. Skipped without a GPU.

tests/second_device tests all else without one.
"""

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from shard_sets import random_packs, write_shard_set
from train_runs import RECIPE, VOCAB, command, records, write_inputs

from shared.shard_reader import open_shard_set
from train.config import OptimConfig
from train.data.loss_weights import uniform_weight
from train.data.micro_batch import make_micro_batch
from train.engine.engine import accumulate, deepspeed_config, start_engine, update
from train.engine.process_group import process_group
from train.model import attention
from train.model.loss import chunked_cross_entropy, liger_cross_entropy
from train.model.model import build_model
from train.recipe_file import load_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

WITHOUT_DROPOUT = RECIPE.replace("attention_dropout = 0.1", "")


def trained(run: Path, shards: Path, recipe: Path, dtype: str, *, hide_gpus: bool) -> list[float]:
    arguments = ("--shards", shards, "--recipe", recipe, "--output", run, "--nproc-per-node", 1)
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hide_gpus else {})}
    settings = (f"engine.dtype={dtype}", "log.every_steps=1")
    flags = [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        command(*arguments, *flags), capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [record["train_loss"] for record in records(run)]


def test_bf16_on_the_gpu_trains_as_fp32_on_the_cpu(tmp_path: Path) -> None:
    shards, recipe = write_inputs(tmp_path, recipe=WITHOUT_DROPOUT)
    losses = trained(tmp_path / "gpu", shards, recipe, "bf16", hide_gpus=False)
    expected = trained(tmp_path / "cpu", shards, recipe, "fp32", hide_gpus=True)
    assert losses == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_kernels_for_whole_rows_attend_within_each_sequence(
    kernel: str, window: int | None
) -> None:
    """Forward and backward, in bf16 against fp32, with grouped heads and lengths that fit no
    tile."""
    if kernel == "flash":
        pytest.importorskip("flash_attn")
    bounds = [0, 1, 130, 193, 449]
    generator = torch.Generator().manual_seed(0)
    heads = {"query": 8, "key": 2, "value": 2}
    data = [
        torch.randn(1, count, bounds[-1], 64, generator=generator).bfloat16()
        for count in heads.values()
    ]
    upstream = torch.randn(1, bounds[-1], 8, 64, generator=generator).bfloat16()
    results = []
    for name, dtype in ((kernel, torch.bfloat16), ("per_sequence", torch.float32)):
        leaves = [tensor.to("cuda", dtype).requires_grad_() for tensor in data]
        output, _ = attention.FUNCTIONS[name](
            torch.nn.Identity(),
            *leaves,
            None,
            sliding_window=window,
            max_length_q=256,
            cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32, device="cuda"),
        )
        output.backward(upstream.to(output))
        # All are [1, heads, rows, size].
        results.append([output.transpose(1, 2), *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        for start, end in pairwise(bounds):
            exact = expected[:, :, start:end]
            # A query that sees one key only has no gradient.
            size = max(exact.norm(), 0.05 * expected.norm())
            assert (actual[:, :, start:end].float() - exact).norm() / size < 0.02


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_ligers_kernel_is_the_loss_of_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, size, vocab = 700, 64, 5003
    hidden = torch.randn(rows, size, generator=generator).to(dtype)
    head = (0.3 * torch.randn(vocab, size, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    results = []
    for device in ("cuda", "cpu"):
        precision = dtype if device == "cuda" else torch.float32
        leaves = [tensor.to(device, precision).requires_grad_() for tensor in (hidden, head)]
        row_losses = torch.empty(rows, device=device)
        if device == "cuda":
            loss = liger_cross_entropy(*leaves, targets.to(device), row_losses) / 3
        else:
            loss = chunked_cross_entropy(*leaves, targets, torch.full((rows,), 1 / 3), row_losses)
        loss.backward()
        results.append([loss.detach(), row_losses, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        assert (actual.cpu().float() - expected).norm() / expected.norm() < tolerance


def test_a_step_on_one_rank_waits_for_nothing(tmp_path: Path) -> None:
    """torch raises an error for each call that synchronises."""
    shards, recipe_file = write_inputs(tmp_path, recipe=WITHOUT_DROPOUT)
    recipe, shard_set = load_recipe(str(recipe_file)), open_shard_set(shards)
    pack = shard_set.pack(0)
    weight = uniform_weight(recipe.loss, int(pack.loss_mask.sum()))
    assert weight is not None
    weights = torch.full((int(pack.loss_mask.sum()),), weight).numpy()
    batches = [make_micro_batch([pack], [weights], uniform_weight=weight) for _ in range(2)]
    with process_group() as ranks:
        kernel = attention.register_attention("varlen")
        model = build_model(
            recipe.model, shard_set.manifest, attention=kernel, dtype=torch.bfloat16, seed=1
        )
        optim = OptimConfig(learning_rate=1e-3)
        engine = start_engine(model, optim, deepspeed_config(0, optim, dtype=torch.bfloat16))
        for step in range(3):
            # Kernels are compiled in the first step.
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                losses = accumulate(engine, batches, ranks)
                update(engine, learning_rate=1e-3)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert losses.isfinite().all()


def test_selftest_passes(tmp_path: Path) -> None:
    packs = random_packs(num_packs=4, max_seq_len=256, vocab_size=VOCAB)
    shards = write_shard_set(tmp_path / "set", packs, max_seq_len=256, vocab_size=VOCAB)
    (tmp_path / "recipe.toml").write_text(WITHOUT_DROPOUT)
    done = subprocess.run(
        command("selftest", "--shards", shards, "--recipe", tmp_path / "recipe.toml"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cuda" in done.stdout
