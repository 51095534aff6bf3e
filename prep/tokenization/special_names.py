"""Read the files beside tokenizer.json: names of special tokens, further tokens, longest input.

They are read as JSON, with the precedence of transformers, so that nothing need be imported.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import DataError

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
# `model_max_length` if the files state none
UNLIMITED = 1 << 62
_PLAIN_KEYS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class TokenizerNames:
    special: dict[str, str]
    """bos_token, eos_token, ... -> content, as in chat templates."""
    further: tuple[str, ...]
    """Contents of special tokens without one of these names, sorted."""
    declared: tuple[str, ...]
    """Contents that transformers would add if tokenizer.json lacked them; here they are ignored."""
    model_max_length: int

    def plain(self) -> dict[str, Any]:
        """Return the part that decides a build, for its inputs."""
        return {
            "special_tokens": self.special,
            "further_special_tokens": list(self.further),
            "model_max_length": self.model_max_length,
        }


def read_names(directory: Path) -> TokenizerNames:
    """Read tokenizer_config.json, special_tokens_map.json and added_tokens.json. Raises DataError
    if one is broken."""
    config, token_map, added = (read_json(directory / name) for name in _PLAIN_KEYS)
    if "added_tokens_decoder" in config:
        declared = [_content(token) for token in _values(config["added_tokens_decoder"])]
    else:
        # the older layout, in which special_tokens_map.json wins
        config = {**config, **token_map}
        declared = list(added)
    special = {name: content for name in NAMED_TOKENS if (content := _content(config.get(name)))}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    # names of a model's own, such as image_token
    others = [
        value for key, value in config.items() if key.endswith("_token") and key not in NAMED_TOKENS
    ]
    further = {content for value in [*_values(extra), *others] if (content := _content(value))}
    limit = config.get("model_max_length")
    return TokenizerNames(
        special=special,
        further=tuple(sorted(further - set(special.values()))),
        declared=tuple(sorted({content for content in declared if content})),
        # files state no limit as 1e30
        model_max_length=(
            int(limit) if isinstance(limit, int | float) and 1 <= limit < UNLIMITED else UNLIMITED
        ),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, {} if there is no file. Raises DataError for anything else."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as exc:
        raise DataError(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise DataError(f"{path} holds no JSON object; correct or remove it")
    return data


def _values(tokens: Any) -> list[Any]:
    if isinstance(tokens, dict):
        return list(tokens.values())
    return list(tokens) if isinstance(tokens, list | tuple) else []


def _content(token: Any) -> str:
    """Return the text of a token, which may be a string or an object; "" for anything else."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
