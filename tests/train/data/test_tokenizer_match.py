"""Shards of another tokenizer than the model's are refused; another spelling of the same one is
not."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from loopback_hub import client_environment, serve_repositories
from prep_builds import REAL_DATA
from shard_sets import random_packs, word_tokenizer, write_shard_set
from train_runs import VOCAB, train_here
from trained_tokenizers import FAMILIES, tokenizer_json
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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


def old_spelling(data: dict[str, Any]) -> None:
    """Write it as releases before 0.20 did."""
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
    """Change what text without special tokens, truncation and padding never meets."""
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
def test_another_spelling_of_one_tokenizer_does_not_differ(
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
def test_a_tokenizer_that_transformers_saved_again_does_not_differ(
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
def test_the_tokenizer_in_a_set_does_not_differ_from_the_file_it_came_from(
    name: str, shards: ShardSet
) -> None:
    folder = REAL_DATA / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("no tokenizers beside the repository")
    tokenizer = load_tokenizer(resolve_tokenizer(TokenizerConfig(name=str(folder)), folder, {}))
    written = encoder_spec(
        tokenizer.tokenizer_json, tokenizer.control_tokens, "transformers"
    ).tokenizer_json
    assert (
        differences(
            parsed(written), parsed((folder / "tokenizer.json").read_bytes()), shards.manifest
        )
        == []
    )


def test_two_families_always_differ(shards: ShardSet) -> None:
    for one in FAMILIES:
        for other in FAMILIES:
            changes = differences(
                parsed(tokenizer_json(one)), parsed(tokenizer_json(other)), shards.manifest
            )
            assert bool(changes) == (one != other), (one, other)


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
def test_shards_of_another_tokenizer_are_refused_unless_the_check_is_off(
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


def paths_in(data: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in (
        data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    ):
        yield (*prefix, key)
        yield from paths_in(data[key], (*prefix, key))


def test_any_damage_beside_the_weights_passes_or_is_an_error_of_ours(
    shards: ShardSet, tmp_path: Path
) -> None:
    text = word_tokenizer(VOCAB)["tokenizer.json"]
    for path in paths_in(parsed(text)):
        for value in (None, 0, 1.5, "", "x", [], {}, ["a"]):
            data = parsed(text)
            inner: Any = data
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
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


def test_the_same_tokenizer_trains_and_a_missing_one_is_logged(
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
    off = (*call, "--model", model, "--output", tmp_path / "off")
    unchecked = train_here(*off, "--set", "model.check_tokenizer=false")
    assert unchecked.exit_code == 0, unchecked.output
    assert "not compared: model.check_tokenizer = false" in unchecked.output


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
        "org/same passes",
        "org/other ArtifactError",
        "org/none passes",
        "org/missing passes",
    ], done.stderr
    assert "are not compared: no tokenizer.json of org/none" in done.stderr
    assert "not compared: cannot get tokenizer.json of org/missing from the hub" in done.stderr


def test_a_model_with_random_weights_has_nothing_to_compare(
    shards: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    check_tokenizer(shards, ModelConfig(config={"model_type": "llama"}))
    assert not caplog.records
