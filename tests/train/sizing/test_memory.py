"""Predicted memory against the peak of bytes on the second device, which has no allocator, no
libraries and no noise.

In bf16, as on a GPU: in fp32 the device has no kernel for rows of several sequences, and torch
keeps score matrices.
"""

from pathlib import Path

import pytest
import torch
from device_runs import run_all, succeeded
from shard_sets import random_packs, write_shard_set

from shared.shard_reader import read_manifest
from train.estimate.memory_advice import setup_of
from train.model.model import model_config
from train.recipe_file import load_recipe
from train.sizing.memory import memory_of
from train.sizing.model_size import model_size

VOCABULARY, MAX_SEQ_LEN, STEPS = 1000, 512, 2

RECIPE = """
name = "memory"
[model]
gradient_checkpointing = {checkpointing}
[model.config]
model_type = "llama"
hidden_size = {hidden}
intermediate_size = {intermediate}
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
[optim]
learning_rate = 1e-3
[schedule]
max_steps = {steps}
[batch]
packs_per_step = {packs}
[engine]
dtype = "bf16"
zero_stage = {stage}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    packs = random_packs(
        num_packs=8, max_seq_len=MAX_SEQ_LEN, vocab_size=VOCABULARY, loss_fraction=1.0
    )
    path = tmp_path_factory.mktemp("memory") / "set"
    return write_shard_set(path, packs, max_seq_len=MAX_SEQ_LEN, vocab_size=VOCABULARY)


def ratio(
    second_device: Path,
    shards: Path,
    folder: Path,
    *,
    ranks: int,
    stage: str,
    checkpointing: bool,
    micro_batches: int,
    hidden: int,
) -> float:
    """Return the predicted peak over the peak of a run."""
    recipe_file = folder / "recipe.toml"
    values = {
        "checkpointing": str(checkpointing).lower(),
        "hidden": hidden,
        "intermediate": hidden * 11 // 4,
    }
    recipe_file.write_text(
        RECIPE.format(**values, packs=micro_batches * ranks, steps=STEPS, stage=stage)
    )
    command = ["--shards", shards, "--recipe", recipe_file, "--output", folder / "run"]
    result = succeeded(run_all(second_device, [command], folder, num_ranks=ranks)[0])
    recipe = load_recipe(str(recipe_file))
    size = model_size(
        model_config(recipe.model, read_manifest(shards)), lora=recipe.lora, dtype=torch.bfloat16
    )
    setup = setup_of(recipe, MAX_SEQ_LEN, ranks, dtype=torch.bfloat16, micro_batches=micro_batches)
    memory = memory_of(size, setup)
    predicted, measured = memory.total - memory.reserve, result["peak_bytes"] - result["live_bytes"]
    print(
        f"predicted {predicted / 2**20:.2f} MiB, in {memory.peak_in}; measured"
        f" {measured / 2**20:.2f} MiB"
    )
    return predicted / measured


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "micro_batches"), [(False, 1), (True, 2)])
def test_one_rank_needs_the_predicted_memory(
    checkpointing: bool, micro_batches: int, second_device: Path, shards: Path, tmp_path: Path
) -> None:
    predicted = ratio(
        second_device,
        shards,
        tmp_path,
        ranks=1,
        stage='"auto"',
        checkpointing=checkpointing,
        micro_batches=micro_batches,
        hidden=128,
    )
    assert predicted == pytest.approx(1, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "hidden"), [("1", 512), ("3", 128)])
def test_two_ranks_need_the_predicted_memory(
    stage: str, hidden: int, second_device: Path, shards: Path, tmp_path: Path
) -> None:
    """In stage 1 the update copies gradients three times; stage 3 has a bucket of 50 million for
    any model."""
    predicted = ratio(
        second_device,
        shards,
        tmp_path,
        ranks=2,
        stage=stage,
        checkpointing=True,
        micro_batches=1,
        hidden=hidden,
    )
    assert predicted == pytest.approx(1, abs=0.04)
