"""Shards of another tokenizer than the model's are refused; tokens that a mixture adds are grown
and trained."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from loopback_hub import client_environment, serve_repositories
from prep_builds import REAL_DATA, build_set, chat, mixture_of, small_tokenizer, write_rows
from safetensors.torch import load_file
from shard_sets import random_packs, word_tokenizer, write_shard_set
from train_runs import VOCAB, losses, records, train_apart, train_here, weights
from trained_tokenizers import FAMILIES, tokenizer_json
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from prep.config import TokenizerConfig
from prep.tokenization.encoder import encoder_spec
from prep.tokenization.tokenizer import load_tokenizer, resolve_tokenizer
from shared.errors import ArtifactError, SftError
from shared.shard_reader import ShardSet, open_shard_set
from train.config import ModelConfig
from train.data.tokenizer_match import check_tokenizer, differences

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
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TABLE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    packs = random_packs(num_packs=10, max_seq_len=32, vocab_size=VOCAB)
    folder = tmp_path_factory.mktemp("shards")
    return open_shard_set(write_shard_set(folder / "set", packs, max_seq_len=32, vocab_size=VOCAB))


def parsed(text: str | bytes) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(text)
    return data


# --- what makes ids
# -------------------------------------------------------------------------------------------------


def old_spelling(data: dict[str, Any]) -> None:
    """As releases before 0.20 wrote it."""
    if "merges" in data["model"]:
        data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    for key in (
        "dropout",
        "fuse_unk",
        "byte_fallback",
        "ignore_merges",
        "continuing_subword_prefix",
    ):
        if not data["model"].get(key):
            data["model"].pop(key, None)
    for key in [key for key, value in data.items() if value is None]:
        del data[key]


def nested(data: dict[str, Any]) -> None:
    if data["pre_tokenizer"]:
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [data["pre_tokenizer"]]}
    data["normalizer"] = {
        "type": "Sequence",
        "normalizers": [data["normalizer"]] if data["normalizer"] else [],
    }


def around(data: dict[str, Any]) -> None:
    """Nothing that text without special tokens added, cut or padded meets."""
    data["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    data["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    data["decoder"] = None
    data["added_tokens"].reverse()
    for token in data["added_tokens"]:
        token["special"] = True


@pytest.mark.parametrize("change", [old_spelling, nested, around])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_other_spellings_of_one_tokenizer_do_not_differ(
    family: str, change: Callable[[dict[str, Any]], None], shards: ShardSet
) -> None:
    ours, theirs = parsed(tokenizer_json(family)), parsed(tokenizer_json(family))
    change(theirs)
    assert theirs != ours
    if change is not around:
        one, other = (tokenizers.Tokenizer.from_str(json.dumps(data)) for data in (ours, theirs))
        assert one.encode("It's 42").ids == other.encode("It's 42").ids
    assert differences(ours, theirs, shards.manifest) == []
    assert differences(theirs, ours, shards.manifest) == []


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_transformers_saves_again_does_not_differ(
    family: str, shards: ShardSet, tmp_path: Path
) -> None:
    ours = parsed(tokenizer_json(family))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(ours))
    ).save_pretrained(tmp_path)
    assert (
        differences(ours, parsed((tmp_path / "tokenizer.json").read_bytes()), shards.manifest) == []
    )


@pytest.mark.parametrize("name", ["olmo2-dolma2", "qwen3"])
def test_the_tokenizer_that_a_set_carries_does_not_differ_from_the_file_it_came_from(
    name: str, shards: ShardSet
) -> None:
    folder = REAL_DATA / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("no tokenizers beside the repository")
    found = load_tokenizer(resolve_tokenizer(TokenizerConfig(name=str(folder)), folder, {}))
    carried = encoder_spec(
        found.tokenizer_json, found.control_tokens, "transformers"
    ).tokenizer_json
    assert (
        differences(
            parsed(carried), parsed((folder / "tokenizer.json").read_bytes()), shards.manifest
        )
        == []
    )


def test_two_families_always_differ(shards: ShardSet) -> None:
    for one in FAMILIES:
        for other in FAMILIES:
            found = differences(
                parsed(tokenizer_json(one)), parsed(tokenizer_json(other)), shards.manifest
            )
            assert bool(found) == (one != other), (one, other)


def swap_two_words(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["w5"], data["model"]["vocab"]["w6"] = 6, 5


def another_split(data: dict[str, Any]) -> None:
    data["pre_tokenizer"] = {"type": "Whitespace"}


def lower_case(data: dict[str, Any]) -> None:
    data["normalizer"] = {"type": "Lowercase"}


def one_token_more(data: dict[str, Any]) -> None:
    data["added_tokens"].append({**data["added_tokens"][0], "id": VOCAB, "content": "<new>"})


def strips(data: dict[str, Any]) -> None:
    data["added_tokens"][0]["rstrip"] = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            swap_two_words,
            "2 entries of the vocabulary differ (shards, model: 'w5' 5 and 6",
        ),
        (another_split, "the pre_tokenizer is"),
        (lower_case, "the normalizer is [] in the shards"),
        (one_token_more, "'<new>' is absent and"),
        (strips, "'w0' is {'id': 0} and {'id': 0, 'rstrip': True}"),
    ],
)
def test_shards_of_another_tokenizer_than_the_models_are_refused_unless_told(
    change: Callable[[dict[str, Any]], None],
    message: str,
    base: Path,
    shards: ShardSet,
    tmp_path: Path,
) -> None:
    model = copied(base, tmp_path / "model")
    data = parsed(word_tokenizer(VOCAB)["tokenizer.json"])
    (tmp_path / "tiny.toml").write_text(RECIPE)
    call = [
        "--shards",
        shards.path,
        "--recipe",
        tmp_path / "tiny.toml",
        "--model",
        model,
        "--output",
        tmp_path / "run",
    ]
    change(data)
    (model / "tokenizer.json").write_text(json.dumps(data))
    done = train_here(*call, "--max-steps", 1)
    assert done.exit_code == 5, done.output
    assert message in done.output
    assert "model.check_tokenizer = false" in done.output
    assert not (tmp_path / "run").exists()
    assert differences(data, data, shards.manifest) == []


def places(data: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in (
        data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    ):
        yield (*here, key)
        yield from places(data[key], (*here, key))


def test_any_damage_beside_the_weights_passes_or_ends_in_one_line(
    shards: ShardSet, tmp_path: Path
) -> None:
    text = word_tokenizer(VOCAB)["tokenizer.json"]
    for place in places(parsed(text)):
        for value in (None, 0, 1.5, "", "x", [], {}, ["a"]):
            data = parsed(text)
            inner: Any = data
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            (tmp_path / "tokenizer.json").write_text(json.dumps(data))
            with contextlib.suppress(SftError):
                check_tokenizer(shards, ModelConfig(name=str(tmp_path)))
    for broken in (b"", b"[]", b"\xff", b"[" * 100_000, b"3"):
        (tmp_path / "tokenizer.json").write_bytes(broken)
        with pytest.raises(ArtifactError):
            check_tokenizer(shards, ModelConfig(name=str(tmp_path)))


def copied(model: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for file in model.iterdir():
        os.link(file, to / file.name)
    return to


def test_the_same_tokenizer_trains_and_none_is_said(
    base: Path, shards: ShardSet, tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    call = ["--shards", shards.path, "--recipe", tmp_path / "tiny.toml", "--max-steps", 1]
    model = copied(base, tmp_path / "model")
    none = train_here(*call, "--model", model, "--output", tmp_path / "none")
    assert none.exit_code == 0, none.output
    assert none.output.count(f"are not compared: {model} has no tokenizer.json") == 1
    (model / "tokenizer.json").write_bytes(word_tokenizer(VOCAB)["tokenizer.json"])
    same = train_here(*call, "--model", model, "--output", tmp_path / "same")
    assert same.exit_code == 0, same.output
    assert "compared" not in same.output
    (model / "tokenizer.json").write_bytes(word_tokenizer(VOCAB + 1)["tokenizer.json"])
    told = train_here(
        *call,
        "--model",
        model,
        "--output",
        tmp_path / "told",
        "--set",
        "model.check_tokenizer=false",
    )
    assert told.exit_code == 0, told.output
    assert "not compared: model.check_tokenizer = false" in told.output


HUB = """
import logging, sys
from pathlib import Path
from shared.shard_reader import open_shard_set
from train.config import ModelConfig
from train.data.tokenizer_match import check_tokenizer
logging.basicConfig(level="INFO", format="%(message)s")
for name in sys.argv[2:]:
    try:
        check_tokenizer(open_shard_set(Path(sys.argv[1])), ModelConfig(name=name))
        print(name, "passes")
    except Exception as exc:
        print(name, type(exc).__name__)
"""


def test_a_hub_models_tokenizer_comes_from_the_hub(shards: ShardSet, tmp_path: Path) -> None:
    files = {"same": word_tokenizer(VOCAB), "other": word_tokenizer(VOCAB + 1), "none": {}}
    for name, contents in files.items():
        (tmp_path / name).mkdir()
        for file, data in {**contents, "config.json": b"{}"}.items():
            (tmp_path / name / file).write_bytes(data)
    with serve_repositories({f"models/org/{name}": tmp_path / name for name in files}) as endpoint:
        environment = {**os.environ, **client_environment(tmp_path / "home", endpoint)}
        names = [f"org/{name}" for name in (*files, "missing")]
        call = [sys.executable, "-c", HUB, str(shards.path), *names]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "org/same passes", "org/other ArtifactError", "org/none passes", "org/missing passes"
    ], done.stderr  # fmt: skip
    assert "are not compared: no tokenizer.json of org/none" in done.stderr
    assert "not compared: cannot get tokenizer.json of org/missing from the hub" in done.stderr


def test_a_model_with_random_weights_has_nothing_to_compare(
    shards: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    check_tokenizer(shards, ModelConfig(config={"model_type": "llama"}))
    assert not caplog.records


# --- tokens that the mixture adds
# -----------------------------------------------------------------------------------

NEW_IDS = (VOCAB, VOCAB + 1)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A set whose mixture added two tokens behind the base model's vocabulary, and uses them."""
    files = word_tokenizer(VOCAB)
    data = parsed(files["tokenizer.json"])
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
    """A model with its tokenizer beside it; a vocabulary above VOCAB is padding, as many models
    have."""
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


LORA = ("lora.rank=4",)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab_size", [VOCAB, VOCAB + 9])
@pytest.mark.parametrize("settings", [(), LORA])
def test_rows_of_added_tokens_are_grown_trained_and_exported(
    settings: tuple[str, ...], vocab_size: int, tied: bool, grown: ShardSet, tmp_path: Path
) -> None:
    model, run = base_model(tmp_path / "base", tied=tied, vocab_size=vocab_size), tmp_path / "run"
    done = train_here(*call_of(grown, model, run, *settings))
    assert done.exit_code == 0, done.output
    assert (
        "get new rows for the tokens that the mixture added, ids"
        f" {list(NEW_IDS)}" in done.output
    )
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
        old, new = (getattr(found, layer)().weight for found in (before, after))
        changed = (old != new).any(dim=1)
        assert changed[list(NEW_IDS)].all()
        if settings:  # everything else of them is frozen, padding included
            own = getattr(AutoModelForCausalLM.from_pretrained(model), layer)().weight
            frozen = [row for row in range(len(own)) if row not in NEW_IDS]
            assert torch.equal(new[frozen], own[frozen])
    loaded = AutoTokenizer.from_pretrained(run / "model")
    assert loaded.encode(f"w3 <{NEW_IDS[0]}> w4", add_special_tokens=False) == [3, NEW_IDS[0], 4]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_an_adapter_with_new_rows_is_the_merged_model_in_peft(
    model_type: str, tied: bool, grown: ShardSet, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = base_model(tmp_path / "base", tied=tied, model_type=model_type)
    for name, settings in (("merged", LORA), ("adapter", (*LORA, "lora.export=adapter"))):
        done = train_here(*call_of(grown, model, tmp_path / name, *settings))
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
    """What training computes with rows beside the frozen matrix, a plain model computes with them
    in it."""
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
    found = records(run)
    tokens = [record["loss_tokens"] for record in found]
    mean = sum(record["train_loss"] * n for record, n in zip(found, tokens, strict=True)) / sum(
        tokens
    )
    assert len(found) > 1
    assert mean == pytest.approx(total / count, rel=1e-4)


def test_a_checkpoint_holds_new_rows_and_a_stopped_run_goes_on_as_it_would_have(
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
    model = base_model(
        tmp_path / "base", tied=True
    )  # the head reads rows of the embedding, which must be gathered
    assert train_here(*call_of(grown, model, tmp_path / "one", *LORA)).exit_code == 0
    done = train_apart(*call_of(grown, model, tmp_path / "both", *LORA), "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    for (_, one), (_, two) in zip(losses(tmp_path / "one"), losses(tmp_path / "both"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "both")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-4)


def test_ids_that_neither_the_model_nor_the_mixture_accounts_for_are_refused(
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
    data = parsed((folder / "tokenizer.json").read_bytes())
    data["added_tokens"] = data["added_tokens"][
        :1
    ]  # <|endoftext|>: a base model knows no chat tokens
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
    config = parsed((model / "config.json").read_bytes())
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
