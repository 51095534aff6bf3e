"""Vocabulary files without a tokenizer.json: converted once, and identified by the result."""

import json
import logging
from pathlib import Path

import pytest
import tokenizers
from prep_builds import build_set, chat, mixture_of, plan_of, write_rows
from trained_tokenizers import digit_groups

from prep.inputs import resolve_inputs
from prep.tokenization import convert_vocabulary
from prep.tokenization.convert_vocabulary import converted_json, converted_sha256
from shared.errors import DataError
from shared.hashing import sha256_bytes

CHAT = [chat("In 2023?", "It's 1999, not 123456."), chat("Hi", "Yo")]
FILES = {"vocab.json": "0" * 64, "merges.txt": "1" * 64}


def write_vocabulary(folder: Path) -> Path:
    data = json.loads(digit_groups(special=()))
    folder.mkdir()
    vocab = {**data["model"]["vocab"], "<|endoftext|>": len(data["model"]["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = "".join(f"{a} {b}\n" for a, b in data["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    names = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_a_conversion_has_the_vocabulary_and_is_identified_by_its_text(tmp_path: Path) -> None:
    folder = write_vocabulary(tmp_path / "tok")
    tokenizer = tokenizers.Tokenizer.from_str(converted_json(folder))
    vocab = json.loads((folder / "vocab.json").read_bytes())
    assert tokenizer.get_vocab(with_added_tokens=True) == vocab
    _, sha256 = converted_sha256(folder, FILES, {})
    assert sha256 == sha256_bytes(converted_json(folder).encode())


def test_a_remembered_hash_holds_for_the_same_files_and_releases_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_vocabulary, "converted_json", lambda _: "converted")
    key, sha256 = converted_sha256(tmp_path, FILES, {})
    assert sha256 == sha256_bytes(b"converted")
    assert converted_sha256(tmp_path, FILES, {key: "remembered"}) == (key, "remembered")
    assert converted_sha256(tmp_path, FILES, {key: 3}) == (key, sha256)
    other_files = {**FILES, "merges.txt": "2" * 64}
    assert converted_sha256(tmp_path, other_files, {key: "remembered"})[1] == sha256
    monkeypatch.setattr(convert_vocabulary.metadata, "version", lambda _: "another")
    assert converted_sha256(tmp_path, FILES, {key: "remembered"})[1] == sha256


def test_files_that_cannot_be_converted_are_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(
        DataError, match=r"has no tokenizer\.json, and transformers cannot make one"
    ):
        converted_json(tmp_path)


def test_a_build_converts_vocabulary_files_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_vocabulary(tmp_path / "tok")
    tables = mixture_of([write_rows(tmp_path / "a.jsonl", CHAT)], folder, template="tulu")
    with caplog.at_level(logging.INFO):
        first = build_set(tables, tmp_path / "out").manifest
    assert caplog.text.count("converted from its other files by transformers") == 1
    with monkeypatch.context() as patch:
        patch.setattr(convert_vocabulary, "converted_json", lambda _: pytest.fail("converted"))
        assert build_set(tables, tmp_path / "out").manifest == first
    monkeypatch.setattr(convert_vocabulary, "converted_json", lambda _: "another conversion")
    inputs = resolve_inputs(plan_of(tables, tmp_path / "out").mixture, tmp_path, {})
    assert [line.partition(":")[0] for line in inputs.differences(first.inputs)] == [
        "tokenizer.json"
    ]
