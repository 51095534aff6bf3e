"""Differences from AutoTokenizer are reported, and decide nothing."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from prep_builds import build_set, chat, mixture_of, write_rows
from tokenizer_dirs import ids, write_tokenizer_dir
from trained_tokenizers import digit_groups
from transformers import AutoTokenizer

from prep.config import TokenizerConfig
from prep.tokenization.at_inference import compare_with_inference
from prep.tokenization.tokenizer import load_tokenizer, resolve_tokenizer

CHAT = [chat("In 2023?", "It's 1999, not 123456."), chat("Hi", "Yo")]


def test_a_build_lists_the_texts_that_transformers_would_split_differently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = write_tokenizer_dir(tmp_path / "tok", digit_groups(), cls="Qwen2Tokenizer")
    tables = mixture_of([write_rows(tmp_path / "a.jsonl", CHAT)], tokenizer)
    with caplog.at_level(logging.WARNING):
        build_set(tables, tmp_path / "out")
    assert "other ids than its tokenizer.json gives" in caplog.text
    report = json.loads((tmp_path / "out" / "build_info.json").read_bytes())
    texts = report["tokenizer_at_inference"]["texts"]
    digits = next(entry for entry in texts if entry["text"] == "2023")
    assert len(digits["at_inference"]) == 4 > len(digits["ids"])
    caplog.clear()
    same = write_tokenizer_dir(tmp_path / "same", digit_groups(), cls="PreTrainedTokenizerFast")
    build_set(mixture_of([tmp_path / "a.jsonl"], same), tmp_path / "other")
    assert not caplog.records
    report = json.loads((tmp_path / "other" / "build_info.json").read_bytes())
    assert report["tokenizer_at_inference"]["texts"] == []
    assert report["tokenizer_at_inference"]["names"] == {}


def test_a_tokenizer_that_transformers_cannot_load_is_reported_and_stops_nothing(
    tmp_path: Path,
) -> None:
    folder = write_tokenizer_dir(
        tmp_path / "tok", digit_groups(), cls="Siglip2Tokenizer", model_type="siglip2"
    )
    files = resolve_tokenizer(TokenizerConfig(name=str(folder)), tmp_path, {})
    assert "not_loaded" in compare_with_inference(files, load_tokenizer(files))


def test_an_up_to_date_build_does_not_import_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = write_tokenizer_dir(tmp_path / "tok", digit_groups())
    tables = mixture_of([write_rows(tmp_path / "a.jsonl", CHAT)], tokenizer)
    first = build_set(tables, tmp_path / "out").manifest
    monkeypatch.setattr(
        "prep.build.build.compare_with_inference", lambda *_: pytest.fail("compared again")
    )
    write_tokenizer_dir(tokenizer, digit_groups(), cls="GPT2Tokenizer", model_type="gpt2")
    assert build_set(tables, tmp_path / "out").manifest == first


def test_an_entry_of_the_vocabulary_that_only_transformers_matches_whole_is_reported(
    tmp_path: Path,
) -> None:
    declared = {"256": {"content": "<tool>", "special": False}}
    text = digit_groups(tokens=("<tool>",))
    folder = write_tokenizer_dir(
        tmp_path / "tok", text, added_tokens_decoder=declared, cls="PreTrainedTokenizerFast"
    )
    files = resolve_tokenizer(TokenizerConfig(name=str(folder)), tmp_path, {})
    loaded = load_tokenizer(files)
    assert len(ids("<tool>", loaded)) > 1
    texts = compare_with_inference(files, loaded)["texts"]
    (entry,) = [entry for entry in texts if "<tool>" in entry["text"]]
    assert len(entry["at_inference"]) < len(entry["ids"])


def test_a_special_token_that_transformers_names_differently_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tokenizer_dir(tmp_path / "tok", digit_groups())
    files = resolve_tokenizer(TokenizerConfig(name=str(folder)), tmp_path, {})
    loaded = load_tokenizer(files)
    other = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "extra_special_tokens": ["<|im_start|>"],
    }
    theirs = SimpleNamespace(
        special_tokens_map=other,
        encode=lambda text, **_: ids(text, loaded),
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: theirs)
    report = compare_with_inference(files, loaded)
    # of names that only transformers has, BOS and EOS count alone
    assert report["names"] == {"eos_token": ["<|endoftext|>", "<|im_end|>"]}
    assert report["texts"] == []
    assert "files name '<|endoftext|>' as eos_token, transformers takes '<|im_end|>'" in caplog.text
