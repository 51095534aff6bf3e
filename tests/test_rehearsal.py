"""The shipped mixtures and recipes by name, from a hub to an exported model; only sizes are small.

The hub is on the loopback device; its repositories have the real names, schema, sources and files.
Models have the real architectures and settings with small sizes and random weights, and tokenizers
have the real control tokens.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from loopback_hub import client_environment, serve_repositories
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from train_runs import records
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shared.shard_reader import open_shard_set

BIN = Path(sys.executable).parent
# The 19 sources of the Tulu 3 mixture, as its `source` column names them.
SOURCES = (
    "ai2-adapt-dev/oasst1_converted",
    "ai2-adapt-dev/flan_v2_converted",
    "ai2-adapt-dev/tulu_hard_coded_repeated_10",
    "ai2-adapt-dev/no_robots_converted",
    "ai2-adapt-dev/tulu_v3.9_wildchat_100k",
    "ai2-adapt-dev/personahub_math_v5_regen_149960",
    "allenai/tulu-3-sft-personas-math-grade",
    "ai2-adapt-dev/tulu_v3.9_open_math_2_gsm8k_50k",
    "ai2-adapt-dev/numinamath_tir_math_decontaminated",
    "ai2-adapt-dev/tulu_v3.9_personahub_math_interm_algebra_20k",
    "ai2-adapt-dev/personahub_code_v2_34999",
    "ai2-adapt-dev/evol_codealpaca_heval_decontaminated",
    "ai2-adapt-dev/personahub_ifdata_manual_seed_v3_29980",
    "ai2-adapt-dev/coconot_converted",
    "ai2-adapt-dev/tulu_v3.9_wildjailbreak_decontaminated_50k",
    "ai2-adapt-dev/tulu_v3.9_synthetic_finalresp_wildguardmixtrain_decontaminated_50k",
    "ai2-adapt-dev/tulu_v3.9_sciriff_10k",
    "ai2-adapt-dev/tulu_v3.9_table_gpt_5k",
    "ai2-adapt-dev/tulu_v3.9_aya_100k",
)
NUM_ROWS = 600
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.06,
}  # fmt: skip
# What the real config.json files hold besides sizes.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "allenai/OLMo-2-1124-7B": {
        "model_type": "olmo2",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 500000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "head_dim": 32,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "attention_bias": False,
    },
}
ARCHITECTURES["allenai/OLMo-2-1124-13B"] = ARCHITECTURES["allenai/OLMo-2-1124-7B"]
ARCHITECTURES["allenai/OLMo-2-0325-32B"] = {
    **ARCHITECTURES["allenai/OLMo-2-1124-7B"],
    "num_key_value_heads": 1,
}
CONTROL = {
    "meta-llama": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "allenai": ("<|endoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "Qwen": (None, "<|im_end|>", "<|im_start|>", "<|endoftext|>"),
}


def colour_rows() -> list[dict[str, Any]]:
    """Conversations that can be learnt in a few steps: the answer repeats a word of the
    question."""
    draw = random.Random(0)
    words = ["red", "blue", "green", "gold", "grey", "pink", "black", "white"]
    rows = []
    for number in range(NUM_ROWS):
        word = draw.choice(words)
        question = f"Say the colour {word} {draw.randint(2, 60) * 'please '}".strip()
        answer = " ".join([word] * draw.randint(1, 40))
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        if number % 50 == 0:
            messages.insert(0, {"role": "system", "content": "Answer with one colour."})
        source = SOURCES[number % len(SOURCES)]
        row_id = f"{source.split('/')[1]}_{number}"
        rows.append({"id": row_id, "messages": messages, "source": source})
    return rows


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
license: odc-by
---
# A mixture
"""


def write_dataset(root: Path, rows: list[dict[str, Any]]) -> None:
    """Parquet shards and a card, as the hub has them."""
    (root / "data").mkdir(parents=True)
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        file = root / "data" / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part), file)
    (root / "README.md").write_text(CARD)


def write_model(root: Path, name: str) -> None:
    """A tokenizer trained on the rows, and a small model of the real architecture."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet)
    texts = [message["content"] for row in colour_rows() for message in row["messages"]]
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos, *others = CONTROL[name.split("/")[0]]
    special = dict.fromkeys(token for token in (bos, eos, *others) if token is not None)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    root.mkdir(parents=True)
    tokenizer.save(str(root / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": bos}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    table = {**SMALL, **ARCHITECTURES[name], "vocab_size": tokenizer.get_vocab_size()}
    table |= {"bos_token_id": bos and tokenizer.token_to_id(bos), "pad_token_id": None}
    table |= {"eos_token_id": tokenizer.token_to_id(eos)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(table.pop("model_type"), **table))
    model.save_pretrained(root)


class Hub:
    """A hub and a directory to work in, with the cache and the environment of both commands."""

    def __init__(self, endpoint: str, work: Path) -> None:
        self.work = work
        client = client_environment(work / "home", endpoint)
        self.environment = {**os.environ, **client, "OMP_NUM_THREADS": "1"}

    def call(self, *arguments: object) -> str:
        command = [str(BIN / str(arguments[0])), *(str(argument) for argument in arguments[1:])]
        options: dict[str, Any] = {"cwd": self.work, "env": self.environment, "timeout": 300}
        done = subprocess.run(command, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    served = {}
    for short in ("mixture", "olmo-2-mixture-0225", "personas-algebra"):
        name = f"allenai/tulu-3-sft-{short}"
        write_dataset(root / name, colour_rows())
        served[f"datasets/{name}"] = root / name
    for name in ARCHITECTURES:
        write_model(root / name, name)
        served[f"models/{name}"] = root / name
    with serve_repositories(served) as endpoint:
        yield Hub(endpoint, tmp_path_factory.mktemp("work"))


def rehearse(
    hub: Hub, mixture: str, *options: str, recipe: str | None = None, ranks: int = 1
) -> Path:
    """Build the mixture unless it exists, train the recipe, and check what holds for all."""
    hub.call("sft-prep", "build", "--mixture", mixture)
    shards = hub.work / "data_cache" / mixture
    named = ("--recipe", recipe) if recipe else ()
    run = hub.work / "runs" / (recipe or mixture)
    call = ("--shards", f"data_cache/{mixture}", *named, "--output", run)
    call += ("--nproc-per-node", ranks, "--set", "optim.learning_rate=0.01")
    hub.call("sft-train", *call, *options)
    losses = [record["train_loss"] for record in records(run)]
    assert losses[-1] < 0.75 * losses[0], losses
    manifest = open_shard_set(shards).manifest
    assert sum(source.rows_used for source in manifest.sources) in (NUM_ROWS, 100)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert (run / "model" / "chat_template.jinja").exists()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say the colour red please"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]
    expected = manifest.tokenizer.eos_token_id
    assert expected in model.generation_config.eos_token_id
    return run


@pytest.mark.slow
def test_two_commands_reproduce_tulu3(hub: Hub) -> None:
    """`sft-prep build --mixture tulu3`, `sft-train --shards data_cache/tulu3`: the fast form, on
    two ranks."""
    small = ("--set", "schedule.epochs=8", "--set", "batch.packs_per_step=2")
    run = rehearse(hub, "tulu3", *small, ranks=2)
    sources = open_shard_set(hub.work / "data_cache" / "tulu3").manifest.sources
    assert [source.name for source in sources] == sorted(SOURCES)
    keys = {key for key in records(run)[-1] if key.startswith("train_loss/")}
    assert keys == {f"train_loss/{source}" for source in SOURCES}
    recipe = json.loads((run / "config.json").read_text())["recipe"]
    assert recipe["name"] == "tulu3-8b"
    assert recipe["model"]["name"] == "meta-llama/Llama-3.1-8B"
    exported = json.loads((run / "model" / "config.json").read_text())
    assert exported["rope_parameters"]["rope_type"] == "llama3"


@pytest.mark.slow
def test_tulu3_as_it_was_released(hub: Hub) -> None:
    """128 conversations per step and their summed loss, as shipped; only the rate is another."""
    run = rehearse(hub, "tulu3", recipe="tulu3-8b-released")
    num_steps = -(-2 * NUM_ROWS // 128)
    assert [record["step"] for record in records(run)] == list(range(1, num_steps + 1))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["olmo2-7b", "olmo2-13b", "olmo2-32b"])
def test_the_olmo2_recipes_share_one_set(recipe: str, hub: Hub) -> None:
    small = ("--set", "batch.packs_per_step=2", "--set", "schedule.epochs=6")
    rehearse(hub, "olmo2", *small, recipe=recipe)
    shard_set = open_shard_set(hub.work / "data_cache" / "olmo2")
    manifest = shard_set.manifest
    firsts = {
        int(shard_set.sequence(number).tokens[0]) for number in range(manifest.totals.sequences)
    }
    assert firsts == {manifest.tokenizer.bos_token_id}


@pytest.mark.slow
def test_olmo2_as_it_was_released_on_two_ranks(hub: Hub) -> None:
    rehearse(hub, "olmo2", recipe="olmo2-13b-released", ranks=2)


@pytest.mark.slow
def test_the_debug_run(hub: Hub) -> None:
    run = rehearse(hub, "tulu3-debug")
    # 100 rows, 4 in a step, twice.
    assert records(run)[-1]["step"] == 50
