"""Do the shards have the ids that the model's weights know? Two tokenizer.json files are compared,
as JSON.

Compared is what makes ids: model, normalizer, pre-tokenizer, added tokens, each brought to one
spelling first, since releases of `tokenizers` write the same thing in several ways. No tokenizer is
constructed.
"""

import json
import logging
from pathlib import Path
from typing import Any

from shared.errors import ArtifactError, one_line, shorten
from shared.shard_format import Manifest
from shared.shard_reader import ShardSet
from train.config import ModelConfig

NAME = "tokenizer.json"
_WITHOUT_EFFECT = {
    "trim_offsets",
    "str_rep",
    "vocab",
    "merges",
}  # on ids; the last two are compared apart
_TRUE_UNLESS_SAID = {"use_regex", "split"}
_SHOWN = 3

logger = logging.getLogger(__name__)


def check_tokenizer(shard_set: ShardSet, model: ModelConfig) -> None:
    """Raise ArtifactError where the tokenizer beside the model's weights makes other ids than that
    of the shards.

    Where there is nothing to compare, that is said. A model with random weights knows no ids yet.
    """
    if model.config is not None:
        return
    if not model.check_tokenizer:
        logger.info(
            "the tokenizers of shards and model are not compared: model.check_tokenizer = false"
        )
        return
    ours = shard_set.tokenizer_dir / NAME
    theirs, why_not = beside_weights(model)
    if theirs is None or not ours.is_file():
        why_not = why_not if theirs is None else f"{shard_set.path} carries no {NAME}"
        logger.info("that shards and model have the same tokenizer is not checked: %s", why_not)
        return
    try:
        found = differences(_read(ours), _read(theirs), shard_set.manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ArtifactError(
            f"{theirs} cannot be compared with {ours}, one of them is no whole {NAME}"
            f" ({type(exc).__name__}: {exc}); put the right one there, or set model.check_tokenizer"
            " = false"
        ) from exc
    if found:
        raise ArtifactError(
            f"{shard_set.path} was made with a tokenizer ({shard_set.manifest.tokenizer.name}) that"
            f" makes other ids than the {NAME} beside the weights of {model.name}:"
            f" {'; '.join(found)}. Build the set with the model's own tokenizer (tokenizer.name),"
            " or set model.check_tokenizer = false if that is meant"
        )


def beside_weights(model: ModelConfig) -> tuple[Path | None, str]:
    """Return the tokenizer.json of a model's directory or hub repository, or None and why there is
    none."""
    folder = Path(model.name)
    if folder.is_dir():
        file = folder / NAME
        return (file, "") if file.is_file() else (None, f"{folder} has no {NAME}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    from shared.hub import NO_ANSWER

    try:
        return Path(hf_hub_download(model.name, NAME, revision=model.revision)), ""
    except EntryNotFoundError as exc:
        return None, f"no {NAME} of {model.name} ({one_line(exc)})"
    except NO_ANSWER as exc:
        return (
            None,
            f"the hub does not give the {NAME} of {model.name} ({one_line(exc)})",
        )  # nor the weights, probably


def differences(ours: dict[str, Any], theirs: dict[str, Any], manifest: Manifest) -> list[str]:
    """Return what makes other ids in `ours`, the tokenizer.json of a shard set, than in
    `theirs`."""
    found = _vocabulary_differences(_vocabulary(ours), _vocabulary(theirs))
    for part in ("model", "normalizer", "pre_tokenizer"):
        mine, other = _steps(ours.get(part)), _steps(theirs.get(part))
        if mine != other:
            found.append(f"the {part} is {_shown(mine)} in the shards, {_shown(other)} there")
    if _merges(ours) != _merges(theirs):
        found.append("the merges of the model differ")
    return found + _added_differences(ours, theirs, manifest)


def _vocabulary(data: dict[str, Any]) -> dict[str, Any]:
    """Return token -> id, or id and score, to nine decimals: its last digit may change when it is
    saved again."""
    vocab = (data.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, dict):
        return vocab
    return {token: [index, round(score, 9)] for index, (token, score) in enumerate(vocab)}


def _vocabulary_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    if ours == theirs:
        return []
    tokens = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    shown = ", ".join(
        f"{token!r} {ours.get(token)} and {theirs.get(token)}" for token in tokens[:_SHOWN]
    )
    return [f"{len(tokens):,} entries of the vocabulary differ (in the shards and there: {shown})"]


def _merges(data: dict[str, Any]) -> list[tuple[str, ...]]:
    merges = (data.get("model") or {}).get("merges") or []
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _steps(part: Any) -> list[Any]:
    """Return a normalizer, pre-tokenizer or model as the plain steps that it consists of."""
    if not part:
        return []
    inner = part.get("normalizers", part.get("pretokenizers"))
    if part.get("type") == "Sequence" and inner is not None:
        return [step for one in inner for step in _steps(one)]
    return [_one_spelling(part)]


def _one_spelling(value: Any) -> Any:
    """Leave out what is not set: null, false, an empty text, and true where that is meant without a
    word."""
    if isinstance(value, list):
        return [_one_spelling(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Metaspace":
        scheme = "never" if value.get("add_prefix_space") is False else "always"
        value = {
            "prepend_scheme": scheme,
            **{key: v for key, v in value.items() if key != "add_prefix_space"},
        }
    elif "merges" in value:
        value = {"type": "BPE", **value}
    return {
        key: _one_spelling(item)
        for key, item in value.items()
        if key not in _WITHOUT_EFFECT
        and not _is_unset(item)
        and not (key in _TRUE_UNLESS_SAID and item)
    }


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value == ""


def _added_differences(
    ours: dict[str, Any], theirs: dict[str, Any], manifest: Manifest
) -> list[str]:
    mine, other, known = _added(ours), _added(theirs), _vocabulary(theirs)
    found = []
    for content in {**mine, **other}:
        if mine.get(content) == other.get(content):
            continue
        if content not in other:
            index = mine[content]["id"]
            if index in manifest.tokenizer.new_ids or known.get(content) == index:
                continue  # the mixture added it, or it has a name and was in the vocabulary
        found.append(
            f"{content!r} is {mine.get(content, 'absent')} and {other.get(content, 'absent')}"
        )
    if not found:
        return []
    return [
        f"{len(found):,} added tokens differ (in the shards and there: {', '.join(found[:_SHOWN])})"
    ]


def _added(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return content -> id and how it is matched; the flag `special` makes no ids."""
    added: dict[str, dict[str, Any]] = {}
    for token in data.get("added_tokens") or []:
        flags = {"normalized": not token.get("special"), **token}
        sides = {
            side: True
            for side in ("lstrip", "rstrip", "single_word", "normalized")
            if flags.get(side)
        }
        added[token["content"]] = {"id": token["id"], **sides}
    return added


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise ArtifactError(
            f"{path} is not readable as JSON: {one_line(exc)}; put a whole one there"
        ) from exc
    if not isinstance(data, dict):
        raise ArtifactError(
            f"{path} is not a tokenizer.json: expected an object; put the right file there"
        )
    return data


def _shown(steps: list[Any]) -> str:
    return shorten(json.dumps(steps, ensure_ascii=False), 120)
