"""The files beside tokenizer.json: names, further tokens and the longest input."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_dirs import loaded_from, write_tokenizer_dir
from trained_tokenizers import digit_groups

from prep.config import TokenizerConfig
from prep.tokenization.special_names import NAMED_TOKENS, UNLIMITED, read_names
from prep.tokenization.tokenizer import load_tokenizer, resolve_tokenizer
from shared.errors import DataError, SftError

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


a_name = st.sampled_from([*NAMED_TOKENS, "image_token", "tool_token"])


@given(
    tokens=st.dictionaries(a_name, st.sampled_from("abc")),
    extra=st.lists(st.sampled_from("abcde"), max_size=3),
    extra_key=st.sampled_from(["extra_special_tokens", "additional_special_tokens"]),
    as_objects=st.booleans(),
)
@settings(deadline=None)
def test_every_token_of_a_config_has_one_of_the_names_or_is_a_further_one(
    tokens: dict[str, str],
    extra: list[str],
    extra_key: str,
    as_objects: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    def spell(token: str) -> Any:
        return {"content": token, "special": True} if as_objects else token

    folder = tmp_path_factory.mktemp("names")
    config = {name: spell(token) for name, token in tokens.items()}
    config[extra_key] = [spell(token) for token in extra]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    names = read_names(folder)
    assert names.special == {name: tokens[name] for name in NAMED_TOKENS if name in tokens}
    others = {*tokens.values(), *extra} - set(names.special.values())
    assert names.further == tuple(sorted(others))
    assert names.model_max_length == UNLIMITED


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1), (2048.0, 2048), (1e30, UNLIMITED), (0, UNLIMITED), ("64", UNLIMITED)],
)
def test_a_longest_input_that_cannot_be_one_is_no_limit(
    value: Any, expected: int, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": value}))
    assert read_names(tmp_path).model_max_length == expected


def test_in_the_older_layout_special_tokens_map_wins(tmp_path: Path) -> None:
    folder = write_tokenizer_dir(tmp_path / "tok", digit_groups())
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}})
    )
    assert loaded_from(folder).special_tokens["eos_token"] == "<|im_end|>"
    write_tokenizer_dir(folder, digit_groups(), added_tokens_decoder={})
    assert loaded_from(folder).special_tokens["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize("key", KEYS)
def test_odd_values_give_a_tokenizer_or_an_error_of_one_line(key: str, tmp_path: Path) -> None:
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
def test_a_broken_file_is_refused_in_one_line(name: str, data: bytes, tmp_path: Path) -> None:
    folder = write_tokenizer_dir(tmp_path / "tok", digit_groups())
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        resolve_tokenizer(TokenizerConfig(name=str(folder)), tmp_path, {})
