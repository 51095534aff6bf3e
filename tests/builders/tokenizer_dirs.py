"""Directories of a tokenizer.json and files beside it, and what is loaded from them."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from prep.config import TokenizerConfig
from prep.tokenization.tokenizer import LoadedTokenizer, load_tokenizer, resolve_tokenizer


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


def ids(text: str, loaded: LoadedTokenizer) -> list[int]:
    encoded: list[int] = (
        tokenizers.Tokenizer.from_str(loaded.tokenizer_json)
        .encode(text, add_special_tokens=False)
        .ids
    )
    return encoded
