"""Tokens that a mixture adds get rows that train: under LoRA beside the frozen matrix, else in the
grown one."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows
from safetensors.torch import load_file
from shard_sets import random_packs, word_tokenizer, write_shard_set
from train_runs import VOCAB, losses, records, train_apart, train_here, weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shared.errors import ConfigError
from shared.shard_reader import ShardSet, open_shard_set
from train.model.new_tokens import add_new_rows, head_weight, with_rows

RECIPE = """
name = "tiny"
[optim]
learning_rate = 0.02
[schedule]
epochs = 3
[batch]
packs_per_step = 4
"""
TABLE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
NEW_IDS = (VOCAB, VOCAB + 1)
LORA = ("lora.rank=4",)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 6), first=st.integers(0, 6), count=st.integers(1, 4))
def test_with_rows_replaces_or_appends_and_keeps_the_rest(
    rows: int, first: int, count: int
) -> None:
    first = min(first, rows)
    weight, new = torch.arange(2.0 * rows).view(rows, 2), -torch.ones(count, 2)
    result = with_rows(weight, new, first)
    expected = weight.tolist()
    expected[first : first + count] = new.tolist()
    assert result.tolist() == expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab_size", [VOCAB, VOCAB + 1, VOCAB + 9])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_network_with_new_rows_is_the_one_with_a_larger_matrix(
    model_type: str, vocab_size: int, tied: bool
) -> None:
    torch.manual_seed(0)
    table = {**TABLE, "vocab_size": vocab_size, "tie_word_embeddings": tied}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **table)).eval()
    network.requires_grad_(False)
    add_new_rows(network, NEW_IDS, seed=3)
    table["vocab_size"] = max(vocab_size, VOCAB + 2)
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **table)).eval()
    state = {name: tensor for name, tensor in network.state_dict().items() if "new_" not in name}
    embedding, head = network.get_input_embeddings(), head_weight(network)
    state["model.embed_tokens.weight"] = with_rows(embedding.weight, embedding.new_rows, VOCAB)
    whole.load_state_dict({**state, "lm_head.weight": head})
    ids = torch.tensor([[3, VOCAB, 4, VOCAB + 1, 5, 0]])
    hidden = network.model(input_ids=ids).last_hidden_state
    assert torch.equal(hidden, whole.model(input_ids=ids).last_hidden_state)
    assert torch.equal(head, whole.get_output_embeddings().weight)
    hidden.sum().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert trained == {"model.embed_tokens.new_rows"}


def test_an_embedding_that_does_more_than_look_up_rows_is_refused() -> None:
    class Scaled(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return 2 * super().forward(input)

    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TABLE))
    network.set_input_embeddings(Scaled(VOCAB, 32))
    with pytest.raises(ConfigError, match="whose embedding is a Scaled"):
        add_new_rows(network, NEW_IDS, seed=3)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A set that holds two tokens which its mixture added to the vocabulary of the base model."""
    files = word_tokenizer(VOCAB)
    data = json.loads(files["tokenizer.json"])
    added = [{**data["added_tokens"][0], "id": index, "content": f"<{index}>"} for index in NEW_IDS]
    data["added_tokens"] += added
    files["tokenizer.json"] = json.dumps(data).encode()
    packs = random_packs(num_packs=10, max_seq_len=32, vocab_size=VOCAB + 2)
    path = tmp_path_factory.mktemp("grown") / "set"
    write_shard_set(
        path, packs, max_seq_len=32, vocab_size=VOCAB + 2, tokenizer_files=files, new_ids=NEW_IDS
    )
    return open_shard_set(path)


def base_model(
    folder: Path, *, tied: bool, vocab_size: int = VOCAB, model_type: str = "llama"
) -> Path:
    """A model with its tokenizer beside it; rows above VOCAB are padding, as in many models."""
    torch.manual_seed(0)
    table = {
        **TABLE,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **table)).save_pretrained(
        folder
    )
    (folder / "tokenizer.json").write_bytes(word_tokenizer(VOCAB)["tokenizer.json"])
    return folder


def call_of(grown: ShardSet, model: Path, run: Path, *settings: str) -> list[object]:
    (run.parent / "tiny.toml").write_text(RECIPE)
    flags = [part for setting in settings for part in ("--set", setting)]
    return [
        "--shards",
        grown.path,
        "--recipe",
        run.parent / "tiny.toml",
        "--model",
        model,
        "--output",
        run,
        *flags,
    ]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab_size", [VOCAB, VOCAB + 9])
@pytest.mark.parametrize("settings", [(), LORA])
def test_rows_of_added_tokens_are_added_trained_and_exported(
    settings: tuple[str, ...], vocab_size: int, tied: bool, grown: ShardSet, tmp_path: Path
) -> None:
    model, run = base_model(tmp_path / "base", tied=tied, vocab_size=vocab_size), tmp_path / "run"
    done = train_here(*call_of(grown, model, run, *settings))
    assert done.exit_code == 0, done.output
    assert f"get new rows for the tokens that the mixture added, ids {list(NEW_IDS)}" in done.output
    start = train_here(
        *call_of(grown, model, tmp_path / "start", *settings, "optim.learning_rate=1e-30")
    )
    assert start.exit_code == 0, start.output
    before, after = (
        AutoModelForCausalLM.from_pretrained(path / "model") for path in (tmp_path / "start", run)
    )
    assert after.config.vocab_size == max(VOCAB + 2, vocab_size)
    assert after.config.tie_word_embeddings == tied
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(network, layer)().weight for network in (before, after))
        changed = (old != new).any(dim=1)
        assert changed[list(NEW_IDS)].all()
        if settings:  # all other rows are frozen, padding included
            base = getattr(AutoModelForCausalLM.from_pretrained(model), layer)().weight
            frozen = [row for row in range(len(base)) if row not in NEW_IDS]
            assert torch.equal(new[frozen], base[frozen])
    loaded = AutoTokenizer.from_pretrained(run / "model")
    assert loaded.encode(f"w3 <{NEW_IDS[0]}> w4", add_special_tokens=False) == [3, NEW_IDS[0], 4]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_an_adapter_with_new_rows_is_the_merged_model_in_peft(
    model_type: str, tied: bool, grown: ShardSet, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = base_model(tmp_path / "base", tied=tied, model_type=model_type)
    for name, changes in (("merged", LORA), ("adapter", (*LORA, "lora.export=adapter"))):
        done = train_here(*call_of(grown, model, tmp_path / name, *changes))
        assert done.exit_code == 0, done.output
    assert f"resize the base model's embedding to {VOCAB + 2}" in done.output
    base = AutoModelForCausalLM.from_pretrained(model)
    base.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    ids = torch.tensor([[3, VOCAB, 4, VOCAB + 1, 5, 0]])
    with torch.no_grad():
        theirs = (
            peft.PeftModel.from_pretrained(base, tmp_path / "adapter" / "model").eval()(ids).logits
        )
        ours = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model").eval()(ids).logits
        )
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_the_loss_with_new_rows_is_that_of_the_grown_model(
    model_type: str, tied: bool, grown: ShardSet, tmp_path: Path
) -> None:
    """Training has the rows beside the frozen matrix, the exported model has them in it."""
    model, run = base_model(tmp_path / "base", tied=tied, model_type=model_type), tmp_path / "run"
    done = train_here(
        *call_of(grown, model, run, *LORA, "schedule.epochs=1", "optim.learning_rate=1e-30")
    )
    assert done.exit_code == 0, done.output
    exported = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    columns, total, count = grown.shards[0], 0.0, 0
    for start, end in pairwise(columns["seq_offsets"].tolist()):
        ids, mask = (
            torch.tensor(columns[name][start:end].astype("int64"))
            for name in ("tokens", "loss_mask")
        )
        with torch.no_grad():
            logits = exported(ids[None]).logits[0, :-1]
        total += float(
            (torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none") * mask[1:]).sum()
        )
        count += int(mask[1:].sum())
    steps = records(run)
    losses_of_steps = [record["train_loss"] * record["loss_tokens"] for record in steps]
    assert len(steps) > 1
    mean = sum(losses_of_steps) / sum(record["loss_tokens"] for record in steps)
    assert mean == pytest.approx(total / count, rel=1e-4)


def test_a_checkpoint_holds_new_rows_and_a_stopped_run_resumes_exactly(
    grown: ShardSet, tmp_path: Path
) -> None:
    model = base_model(tmp_path / "base", tied=False)
    assert train_here(*call_of(grown, model, tmp_path / "whole", *LORA)).exit_code == 0
    assert (
        train_here(*call_of(grown, model, tmp_path / "run", *LORA), "--stop-after", 3).exit_code
        == 75
    )
    assert train_here(*call_of(grown, model, tmp_path / "run", *LORA)).exit_code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    assert train_here("export", last, tmp_path / "out").exit_code == 0
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")[name], tensor)


@pytest.mark.slow
def test_two_ranks_of_zero_3_learn_new_rows_as_one_rank_does(
    grown: ShardSet, tmp_path: Path
) -> None:
    # Tied: the head reads rows of the embedding, which ZeRO-3 must gather.
    model = base_model(tmp_path / "base", tied=True)
    assert train_here(*call_of(grown, model, tmp_path / "one", *LORA)).exit_code == 0
    done = train_apart(*call_of(grown, model, tmp_path / "both", *LORA), "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    for (_, one), (_, two) in zip(losses(tmp_path / "one"), losses(tmp_path / "both"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "both")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-4)


def test_ids_that_neither_the_model_nor_the_mixture_has_are_refused(
    grown: ShardSet, tmp_path: Path
) -> None:
    model = base_model(tmp_path / "base", tied=False, vocab_size=VOCAB - 1)
    done = train_here(*call_of(grown, model, tmp_path / "run", "model.check_tokenizer=false"))
    assert done.exit_code == 3, done.output
    assert "tokenizer.add_tokens" in done.output
    assert "model.resize_vocab = true" in done.output


@pytest.mark.parametrize("settings", [(), LORA])
def test_chat_tokens_added_to_a_base_model_are_in_the_exported_model_as_they_were_trained(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    folder = small_tokenizer(tmp_path / "tokenizer")
    data = json.loads((folder / "tokenizer.json").read_bytes())
    # Only <|endoftext|>: a base model knows no chat tokens.
    data["added_tokens"] = data["added_tokens"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    chats = [chat("What is 2 + 2?", f"It is {number}.") for number in range(40)]
    tables = mixture_of([write_rows(tmp_path / "a.jsonl", chats)], folder)
    tables["tokenizer"]["add_tokens"] = ["<|im_start|>", "<|im_end|>"]
    shards = build_set(tables, tmp_path / "set")
    first = shards.manifest.tokenizer.new_ids[0]
    model = base_model(tmp_path / "base", tied=False, vocab_size=first)
    (model / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    run = tmp_path / "run"
    table = {"max_position_embeddings": 128}
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, **table}))
    done = train_here(*call_of(shards, model, run, *settings), "--max-steps", 2)
    assert done.exit_code == 0, done.output
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    assert loaded.get_input_embeddings().num_embeddings == first + 2 == len(tokenizer)
    columns = shards.shards[0]
    bounds = pairwise(columns["seq_offsets"].tolist())
    trained = {tuple(columns["tokens"][start:end].tolist()) for start, end in bounds}
    rendered = {
        tuple(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in chats
    }
    assert rendered == trained
    assert first + 1 in loaded.generation_config.eos_token_id
