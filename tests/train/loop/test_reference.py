"""Twenty steps of `sft-train` give the numbers of a trainer that shares no code with it.

`sft-train` packs, shards over ranks, chunks its loss and fuses its update; reference_trainer.py
runs each sequence alone in plain torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_trainer import Settings, Tokens, Trained, sequences_of, train
from shard_sets import random_packs, write_shard_set
from train_runs import VOCAB, records, train_apart, train_here, weights
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.slow

STEPS = 20
TABLE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    settings: Settings
    per_step: int = 4
    unit: str = "packs"
    per_micro_batch: int = 1


CASES = {
    "token": Case(model="llama", settings=Settings(warmup_ratio=0.2, max_grad_norm=0.5)),
    "sample, tied, two packs a micro-batch": Case(
        model="qwen3-tied",
        settings=Settings(norm="sample", kind="cosine", warmup_ratio=0.1),
        per_micro_batch=2,
    ),
    "sum, conversations": Case(
        model="llama",
        settings=Settings(norm="sum", divisor=16.0, kind="constant"),
        per_step=9,
        unit="conversations",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a set of three shards and one to evaluate on; some sequences of both have no loss
    token."""
    folder = tmp_path_factory.mktemp("reference")
    for name, num_packs, seed in (("set", 25, 3), ("held-out", 4, 4)):
        packs = random_packs(
            num_packs=num_packs, max_seq_len=48, vocab_size=VOCAB, seed=seed, loss_fraction=0.4
        )
        write_shard_set(folder / name, packs, max_seq_len=48, vocab_size=VOCAB, packs_per_shard=10)
    for name, model_type, tied in (("llama", "llama", False), ("qwen3-tied", "qwen3", True)):
        torch.manual_seed(1)
        config = AutoConfig.for_model(model_type, **TABLE, tie_word_embeddings=tied)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    (folder / "recipe.toml").write_text(
        'name = "reference"\n[optim]\nlearning_rate = 1.0\n[batch]\npacks_per_step = 4\n'
        "[log]\nevery_steps = 1\n"
    )
    return folder


def command(folder: Path, case: Case, run: Path) -> list[object]:
    chosen = case.settings
    micro_batch = f"packs_per_micro_batch={case.per_micro_batch}"
    settings = {
        "batch": f"{{{case.unit}_per_step={case.per_step}, {micro_batch}}}",
        "loss.norm": chosen.norm,
        "loss.divisor": chosen.divisor,
        "schedule.kind": chosen.kind,
        "schedule.warmup_ratio": chosen.warmup_ratio,
        "optim.learning_rate": chosen.learning_rate,
        "optim.betas": f"[{chosen.betas[0]}, {chosen.betas[1]}]",
        "optim.weight_decay": chosen.weight_decay,
        "optim.max_grad_norm": chosen.max_grad_norm,
    }
    return [
        *("--shards", folder / "set", "--recipe", folder / "recipe.toml"),
        *("--model", folder / case.model, "--eval-shards", folder / "held-out"),
        *("--output", run, "--max-steps", STEPS),
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
    ]


def steps_of(folder: Path, run: Path) -> list[list[Tokens]]:
    """Return the sequences of each step. Which they are only the run can tell; their content is
    read from the columns."""
    sequences = sequences_of(folder / "set")
    steps = []
    for step in range(1, STEPS + 1):
        lines = train_here("which", run, "--step", step, "--json").stdout.splitlines()
        rows = [json.loads(line) for line in lines]
        steps.append([sequences[row["row"], row["first_token"]] for row in rows])
    return steps


def reference(folder: Path, name: str, run: Path) -> Trained:
    case = CASES[name]
    held_out = list(sequences_of(folder / "held-out").values())
    return train(folder / case.model, steps_of(folder, run), held_out, case.settings)


def assert_same(run: Path, expected: Trained) -> None:
    run_records: list[dict[str, Any]] = records(run)
    steps = [record for record in run_records if "train_loss" in record]
    assert [record["train_loss"] for record in steps] == pytest.approx(expected.losses, rel=1e-6)
    assert [record["grad_norm"] for record in steps] == pytest.approx(expected.grad_norms, rel=1e-5)
    (evaluation,) = [record for record in run_records if "eval_loss" in record]
    assert evaluation["eval_loss"] == pytest.approx(expected.eval_loss, rel=1e-6)
    # AdamW amplifies the rounding of a gradient that is next to nothing.
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected.weights[name], rtol=1e-4, atol=1e-4)
    assert steps[-1]["train_loss"] != pytest.approx(steps[0]["train_loss"], rel=1e-2), (
        "nothing was trained"
    )


@pytest.mark.parametrize("name", CASES)
def test_one_rank_is_a_plain_loop_over_sequences(name: str, folder: Path, tmp_path: Path) -> None:
    done = train_here(*command(folder, CASES[name], tmp_path / "run"))
    assert done.exit_code == 0, done.output
    assert_same(tmp_path / "run", reference(folder, name, tmp_path / "run"))


def test_two_ranks_are_the_same_loop(folder: Path, tmp_path: Path) -> None:
    """ZeRO-3; which sequences make up a step does not depend on the ranks."""
    done = train_apart(*command(folder, CASES["token"], tmp_path / "run"), "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", reference(folder, "token", tmp_path / "run"))
