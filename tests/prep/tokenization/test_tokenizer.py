"""Ids come from tokenizer.json alone, whatever class or model the files beside it name, from
wherever they come."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from loopback_hub import client_environment, serve_repositories
from prep_builds import REAL_DATA, build_set, chat, mixture_of, plan_of, write_rows
from repository import HELPERS
from trained_tokenizers import CONTROL, digit_groups
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from prep.config import TokenizerConfig
from prep.inputs import resolve_inputs
from prep.rendering.template import TemplateText
from prep.tokenization.at_inference import TEXTS, compare_with_inference
from prep.tokenization.encoder import encoder_spec
from prep.tokenization.tokenizer import (
    LoadedTokenizer,
    load_tokenizer,
    resolve_tokenizer,
    write_tokenizer,
)
from shared.errors import ConfigError, DataError, SftError

CLASSES = [
    *sorted({name for name in TOKENIZER_MAPPING_NAMES.values() if name}),
    "PreTrainedTokenizerFast",
    "Nobodys",
]
BUILT = (
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "GPTNeoXTokenizerFast",
    "CohereTokenizerFast",
    "LlamaTokenizer",
)
OLMO2 = REAL_DATA / "tokenizers" / "olmo2-dolma2"
FROM_HUB = """
import sys
from pathlib import Path
builders, doubles, rows, out, *names = sys.argv[1:]
sys.path[:0] = [builders, doubles]
from prep_builds import build_set, mixture_of
for name in names:
    tables = mixture_of([Path(rows)], Path()) | {"tokenizer": {"name": name}}
    print(build_set(tables, Path(out) / name / "out").manifest.fingerprint)
"""
CHAT = [chat("In 2023?", "It's 1999, not 123456."), chat("Hi", "Yo")]


def write_tokenizer_dir(
    path: Path, text: str, *, cls: str = "", model_type: str = "", **named: Any
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(text, encoding="utf-8")
    names = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", **named}
    (path / "tokenizer_config.json").write_text(
        json.dumps(names | ({"tokenizer_class": cls} if cls else {}))
    )
    if model_type:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def loaded_from(path: Path, **options: Any) -> LoadedTokenizer:
    return load_tokenizer(
        resolve_tokenizer(TokenizerConfig(name=str(path)), path.parent, {}), **options
    )


def ids(text: str, found: LoadedTokenizer) -> list[int]:
    encoded: list[int] = (
        tokenizers.Tokenizer.from_str(found.tokenizer_json)
        .encode(text, add_special_tokens=False)
        .ids
    )
    return encoded


def test_no_class_and_no_model_beside_it_changes_what_a_tokenizer_json_gives(
    tmp_path: Path,
) -> None:
    text = digit_groups()
    rows = write_rows(tmp_path / "a.jsonl", CHAT)
    model_types = {cls: name for name, cls in TOKENIZER_MAPPING_NAMES.items()}
    digests, contents = set(), set()
    for cls in CLASSES:
        for model_type in ("", model_types.get(cls, "llama")):
            folder = tmp_path / cls / (model_type or "alone") / "tok"
            write_tokenizer_dir(folder, text, cls=cls, model_type=model_type)
            inputs = resolve_inputs(
                plan_of(mixture_of([rows], folder), tmp_path / "out").mixture, tmp_path, {}
            )
            digests.add(inputs.digest)
            contents.add(load_tokenizer(inputs.tokenizer).tokenizer_json)
    assert len(CLASSES) > 50
    assert len(digests) == 1
    (content,) = contents
    theirs, ours = tokenizers.Tokenizer.from_str(text), tokenizers.Tokenizer.from_str(content)
    for sample in (*TEXTS, *(f"a{token}b {token} 2023" for token in CONTROL)):
        assert ours.encode(sample).ids == theirs.encode(sample).ids


def test_a_set_is_the_same_whatever_lies_beside_tokenizer_json_in_a_directory_and_on_the_hub(
    tmp_path: Path,
) -> None:
    text, rows = digit_groups(), write_rows(tmp_path / "a.jsonl", CHAT)
    fingerprints, digests, served = set(), set(), {}
    for number, cls in enumerate(BUILT):
        for model_type in ("", ("gpt2", "qwen2", "gpt_neox", "cohere", "llama")[number]):
            folder = write_tokenizer_dir(
                tmp_path / cls / (model_type or "alone") / "tok",
                text,
                cls=cls,
                model_type=model_type,
            )
            served[f"models/org/{cls}-{model_type or 'alone'}"] = folder
            manifest = build_set(mixture_of([rows], folder), folder.parent / "out").manifest
            fingerprints.add(manifest.fingerprint)
            digests.add(manifest.inputs_digest)
    assert len(digests) == 1
    with serve_repositories(served) as endpoint:
        names = [name.removeprefix("models/") for name in served]
        environment = {**os.environ, **client_environment(tmp_path / "home", endpoint)}
        call = [
            sys.executable,
            "-c",
            FROM_HUB,
            str(HELPERS[0]),
            str(HELPERS[1]),
            str(rows),
            str(tmp_path / "hub"),
            *names,
        ]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fingerprints |= set(done.stdout.split())
    assert len(fingerprints) == 1


def test_the_build_says_which_texts_transformers_would_split_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = write_tokenizer_dir(tmp_path / "tok", digit_groups(), cls="Qwen2Tokenizer")
    tables = mixture_of([write_rows(tmp_path / "a.jsonl", CHAT)], tokenizer)
    with caplog.at_level(logging.WARNING):
        build_set(tables, tmp_path / "out")
    assert "other ids than its tokenizer.json gives" in caplog.text
    noted = json.loads((tmp_path / "out" / "build_info.json").read_bytes())[
        "tokenizer_at_inference"
    ]
    digits = next(entry for entry in noted["texts"] if entry["text"] == "2023")
    assert len(digits["at_inference"]) == 4 > len(digits["ids"])
    caplog.clear()
    same = write_tokenizer_dir(tmp_path / "same", digit_groups(), cls="PreTrainedTokenizerFast")
    build_set(mixture_of([tmp_path / "a.jsonl"], same), tmp_path / "other")
    assert not caplog.records
    noted = json.loads((tmp_path / "other" / "build_info.json").read_bytes())[
        "tokenizer_at_inference"
    ]
    assert noted["texts"] == []
    assert noted["names"] == {}


def test_a_tokenizer_that_transformers_cannot_load_is_noted_only(tmp_path: Path) -> None:
    folder = write_tokenizer_dir(
        tmp_path / "tok", digit_groups(), cls="Siglip2Tokenizer", model_type="siglip2"
    )
    files = resolve_tokenizer(TokenizerConfig(name=str(folder)), tmp_path, {})
    assert "not_loaded" in compare_with_inference(files, load_tokenizer(files))


def test_an_up_to_date_build_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = write_tokenizer_dir(tmp_path / "tok", digit_groups())
    tables = mixture_of([write_rows(tmp_path / "a.jsonl", CHAT)], tokenizer)
    first = build_set(tables, tmp_path / "out").manifest
    monkeypatch.setattr(
        "prep.build.build.compare_with_inference", lambda *_: pytest.fail("transformers was asked")
    )
    write_tokenizer_dir(tokenizer, digit_groups(), cls="GPT2Tokenizer", model_type="gpt2")
    assert build_set(tables, tmp_path / "out").manifest == first


@pytest.mark.skipif(not OLMO2.is_dir(), reason="no OLMo-2 tokenizer beside the repository")
@pytest.mark.parametrize("model_type", ["", "gpt2", "olmo2"])
def test_olmo_2_takes_three_digits_at_a_time_whatever_class_its_files_name(
    model_type: str, tmp_path: Path
) -> None:
    text = (OLMO2 / "tokenizer.json").read_text(encoding="utf-8")
    folder = write_tokenizer_dir(tmp_path / "tok", text, cls="GPT2Tokenizer", model_type=model_type)
    assert ids("2023", loaded_from(folder)) == [2366, 18]


def test_what_is_exported_gives_our_ids_beside_the_config_of_any_model(tmp_path: Path) -> None:
    found = loaded_from(write_tokenizer_dir(tmp_path / "tok", digit_groups(), cls="GPT2Tokenizer"))
    spec = encoder_spec(found.tokenizer_json, found.control_tokens, "transformers")
    write_tokenizer(tmp_path / "out", found, spec.tokenizer_json, TemplateText("none", ""))
    forced = {
        name
        for name, cls in TOKENIZER_MAPPING_NAMES.items()
        if name in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS and cls != "TokenizersBackend"
    }  # transformers takes the model's class here, whatever tokenizer_config.json says
    assert not forced & {"llama", "olmo2", "olmo3", "qwen3", "mistral", "gemma3"}
    for model_type in ["", *sorted(set(TOKENIZER_MAPPING_NAMES) - forced)]:
        if model_type:
            (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
        for text in (*TEXTS[:4], "<|im_start|>2023<|im_end|>"):
            assert theirs.encode(text, add_special_tokens=False) == ids(text, found), model_type


# --- names of special tokens
# ----------------------------------------------------------------------------------------


def test_a_named_token_of_the_vocabulary_alone_is_matched_whole_and_is_a_control_token(
    tmp_path: Path,
) -> None:
    text = digit_groups(special=CONTROL[1:], tokens=("</s>", "<unk>"))
    folder = write_tokenizer_dir(
        tmp_path / "tok",
        text,
        eos_token={"__type": "AddedToken", "content": "</s>"},
        bos_token=None,
    )
    found = loaded_from(folder)
    assert found.special_tokens == {"eos_token": "</s>"}
    assert "</s>" in found.control_tokens
    assert found.added_tokens["</s>"] is True
    assert "<unk>" not in found.added_tokens
    assert ids("a</s>b", found)[1] == found.special_ids["eos_token"]
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs.encode("a</s>b", add_special_tokens=False) == ids("a</s>b", found)


def test_added_tokens_are_told_with_their_flag(tmp_path: Path) -> None:
    data = json.loads(digit_groups())
    data["added_tokens"][1]["special"] = False
    found = loaded_from(
        write_tokenizer_dir(tmp_path / "tok", json.dumps(data), eos_token="<|im_start|>")
    )
    assert found.added_tokens == {token: token != CONTROL[1] for token in sorted(CONTROL)}
    assert CONTROL[1] in found.control_tokens  # it has a name


def test_the_older_layout_has_its_names_in_special_tokens_map(tmp_path: Path) -> None:
    folder = write_tokenizer_dir(tmp_path / "tok", digit_groups())
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}})
    )
    assert loaded_from(folder).special_tokens["eos_token"] == "<|im_end|>"
    write_tokenizer_dir(folder, digit_groups(), added_tokens_decoder={})
    assert loaded_from(folder).special_tokens["eos_token"] == "<|endoftext|>"


def test_a_name_that_decides_is_an_input(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", CHAT)
    trees = []
    for eos in ("<|endoftext|>", "<|im_end|>"):
        folder = write_tokenizer_dir(tmp_path / "tok", digit_groups(), eos_token=eos)
        plan = plan_of(mixture_of([rows], folder), tmp_path / "out")
        trees.append(resolve_inputs(plan.mixture, tmp_path, {}))
    assert trees[1].differences(trees[0].tree) == [
        'tokenizer.special_tokens.eos_token: "<|endoftext|>" -> "<|im_end|>"'
    ]


@pytest.mark.parametrize("name", ["eos_token", "bos_token"])
def test_an_eos_or_bos_without_an_id_is_refused(name: str, tmp_path: Path) -> None:
    folder = write_tokenizer_dir(tmp_path / "tok", digit_groups(), **{name: "</s>"})
    with pytest.raises(DataError, match=rf"names '</s>' as its {name}.*tokenizer.add_tokens"):
        loaded_from(folder)
    assert loaded_from(folder, add_tokens=["</s>"]).special_tokens[name] == "</s>"


def test_tokens_that_only_transformers_would_add_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    declared = {"999": {"content": "<|extra|>", "special": True}}
    folder = write_tokenizer_dir(
        tmp_path / "tok", digit_groups(), pad_token="[PAD]", added_tokens_decoder=declared
    )
    found = loaded_from(folder)
    assert "list 1 tokens that it does not have (<|extra|>)" in caplog.text
    assert "names '[PAD]' as its pad_token" in caplog.text
    assert found.special_tokens.keys() == {"eos_token", "bos_token"}


def test_an_entry_of_the_vocabulary_that_only_transformers_matches_whole_is_told(
    tmp_path: Path,
) -> None:
    """tokenizer.json decides; that inference through transformers would differ is in
    build_info.json."""
    declared = {"256": {"content": "<tool>", "special": False}}
    text = digit_groups(tokens=("<tool>",))
    folder = write_tokenizer_dir(
        tmp_path / "tok", text, added_tokens_decoder=declared, cls="PreTrainedTokenizerFast"
    )
    files = resolve_tokenizer(TokenizerConfig(name=str(folder)), tmp_path, {})
    found = load_tokenizer(files)
    assert len(ids("<tool>", found)) > 1
    (told,) = [
        entry
        for entry in compare_with_inference(files, found)["texts"]
        if "<tool>" in entry["text"]
    ]
    assert len(told["at_inference"]) < len(told["ids"])


# --- no tokenizer.json
# ----------------------------------------------------------------------------------------------


def test_vocabulary_files_are_converted_once_and_hashed_as_converted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.loads(digit_groups(special=()))
    folder = tmp_path / "tok"
    folder.mkdir()
    vocab = {**data["model"]["vocab"], "<|endoftext|>": len(data["model"]["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in data["model"]["merges"])
    )
    names = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    tables = mixture_of([write_rows(tmp_path / "a.jsonl", CHAT)], folder, template="tulu")
    with caplog.at_level(logging.INFO):
        first = build_set(tables, tmp_path / "out").manifest
    assert (
        caplog.text.count("has no tokenizer.json: converted from its other files by transformers")
        == 1
    )
    monkeypatch.setattr(
        "prep.tokenization.convert_vocabulary.converted_json",
        lambda *_: pytest.fail("converted again"),
    )
    assert build_set(tables, tmp_path / "out").manifest == first  # its hash is remembered
    monkeypatch.undo()
    monkeypatch.setattr(
        "prep.tokenization.convert_vocabulary.converted_json",
        lambda *_: '{"another": "conversion"}',
    )
    inputs = resolve_inputs(plan_of(tables, tmp_path / "out").mixture, tmp_path, {})
    assert [line.partition(":")[0] for line in inputs.differences(first.inputs)] == [
        "tokenizer.json"
    ]


def test_a_directory_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json, tokenizer\.model or vocab\.json"):
        loaded_from(tmp_path / "tok")


def test_a_tokenizer_json_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    for text in ("{}", "[", '{"model": 3}', "[" * 100_000):
        with pytest.raises(DataError, match="is not a tokenizer"):
            loaded_from(write_tokenizer_dir(tmp_path / "tok", text))


ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    [],
    ["x", None, {"content": "y"}],
    {},
    {"0": 3},
]
KEYS = (
    "eos_token",
    "pad_token",
    "added_tokens_decoder",
    "extra_special_tokens",
    "additional_special_tokens",
    "model_max_length",
    "image_token",
    "chat_template",
    "tokenizer_class",
)


@pytest.mark.parametrize("key", KEYS)
def test_odd_values_in_the_files_beside_it_end_in_a_tokenizer_or_one_line(
    key: str, tmp_path: Path
) -> None:
    for number, value in enumerate(ODD):
        folder = write_tokenizer_dir(tmp_path / str(number), digit_groups(), **{key: value})
        with contextlib.suppress(SftError):
            files = resolve_tokenizer(TokenizerConfig(name=str(folder)), tmp_path, {})
            files.chat_template()
            assert 0 < load_tokenizer(files).model_max_length <= 1 << 62


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_broken_file_beside_it_is_refused_in_one_line(
    name: str, data: bytes, tmp_path: Path
) -> None:
    folder = write_tokenizer_dir(tmp_path / "tok", digit_groups())
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        resolve_tokenizer(TokenizerConfig(name=str(folder)), tmp_path, {})
