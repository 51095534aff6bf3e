"""Check that the shards hold the ids that the model's weights know, by comparing two tokenizer.json
files.

What decides the ids is compared as JSON: model, normalizer, pre-tokenizer and added tokens. Each is
normalised first, since releases of `tokenizers` write the same thing in several ways. No tokenizer
is constructed.
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
# Keys without an effect on ids, and two that are compared separately.
_NOT_COMPARED = {"trim_offsets", "str_rep", "vocab", "merges"}
_TRUE_BY_DEFAULT = {"use_regex", "split"}
_SHOWN = 3

logger = logging.getLogger(__name__)


def check_tokenizer(shard_set: ShardSet, model: ModelConfig) -> None:
    """Raise ArtifactError if the tokenizer beside the model's weights makes other ids than that of
    the shards.

    If there is nothing to compare, that is logged. A model with random weights knows no ids yet.
    """
    if model.config is not None:
        return
    if not model.check_tokenizer:
        logger.info(
            "the tokenizers of shards and model are not compared: model.check_tokenizer = false"
        )
        return
    ours = shard_set.tokenizer_dir / NAME
    theirs, reason = beside_weights(model)
    if theirs is None or not ours.is_file():
        reason = reason if theirs is None else f"{shard_set.path} has no {NAME}"
        logger.info("the tokenizers of shards and model are not compared: %s", reason)
        return
    try:
        changes = differences(_read(ours), _read(theirs), shard_set.manifest)
    # Keys or types that no tokenizer.json has: one of the files is another, or damaged.
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ArtifactError(
            f"cannot compare {theirs} with {ours}: one of them is not a complete {NAME}"
            f" ({type(exc).__name__}: {exc}); replace it, or set model.check_tokenizer = false"
        ) from exc
    if changes:
        raise ArtifactError(
            f"{shard_set.path} was built with a tokenizer ({shard_set.manifest.tokenizer.name})"
            f" that makes other ids than the {NAME} beside the weights of {model.name}:"
            f" {'; '.join(changes)}. Build the set with the model's tokenizer (tokenizer.name), or"
            " set model.check_tokenizer = false if this is intended"
        )


def beside_weights(model: ModelConfig) -> tuple[Path | None, str]:
    """Return the tokenizer.json of a model's directory or hub repository, or None and the reason
    why there is none."""
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
        return None, f"cannot get {NAME} of {model.name} from the hub ({one_line(exc)})"


def differences(ours: dict[str, Any], theirs: dict[str, Any], manifest: Manifest) -> list[str]:
    """Return what makes `ours`, the tokenizer.json of a shard set, give other ids than `theirs`."""
    changes = []
    mine, other = _vocabulary(ours), _vocabulary(theirs)
    if mine != other:
        tokens = [token for token in {**mine, **other} if mine.get(token) != other.get(token)]
        shown = ", ".join(
            f"{token!r} {mine.get(token)} and {other.get(token)}" for token in tokens[:_SHOWN]
        )
        changes.append(f"{len(tokens):,} entries of the vocabulary differ (shards, model: {shown})")
    for part in ("model", "normalizer", "pre_tokenizer"):
        steps, other_steps = _steps(ours.get(part)), _steps(theirs.get(part))
        if steps != other_steps:
            changes.append(
                f"the {part} is {_shown(steps)} in the shards, {_shown(other_steps)} in the model"
            )
    if _merges(ours) != _merges(theirs):
        changes.append("the merges differ")
    return changes + _added_differences(ours, theirs, manifest)


def _vocabulary(data: dict[str, Any]) -> dict[str, Any]:
    """Return token -> id, or id and score, to nine decimals: saving may change the last digit."""
    vocab = (data.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, dict):
        return vocab
    return {token: [index, round(score, 9)] for index, (token, score) in enumerate(vocab)}


def _merges(data: dict[str, Any]) -> list[tuple[str, ...]]:
    merges = (data.get("model") or {}).get("merges") or []
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _steps(part: Any) -> list[Any]:
    """Return a normalizer, pre-tokenizer or model as a flat list of normalised steps."""
    if not part:
        return []
    inner = part.get("normalizers", part.get("pretokenizers"))
    if part.get("type") == "Sequence" and inner is not None:
        return [step for nested in inner for step in _steps(nested)]
    return [_normalise(part)]


def _normalise(value: Any) -> Any:
    """Drop keys that have their default value: null, false, an empty string, or true for some."""
    if isinstance(value, list):
        return [_normalise(item) for item in value]
    if not isinstance(value, dict):
        return value
    # Older releases write add_prefix_space for prepend_scheme, and no type for BPE.
    if value.get("type") == "Metaspace":
        scheme = "never" if value.get("add_prefix_space") is False else "always"
        value = {
            "prepend_scheme": scheme,
            **{key: v for key, v in value.items() if key != "add_prefix_space"},
        }
    elif "merges" in value:
        value = {"type": "BPE", **value}
    return {
        key: _normalise(item)
        for key, item in value.items()
        if key not in _NOT_COMPARED
        and not (item is None or item is False or item == "")
        and not (key in _TRUE_BY_DEFAULT and item)
    }


def _added_differences(
    ours: dict[str, Any], theirs: dict[str, Any], manifest: Manifest
) -> list[str]:
    mine, other, known = _added(ours), _added(theirs), _vocabulary(theirs)
    changes = []
    for content in {**mine, **other}:
        if mine.get(content) == other.get(content):
            continue
        if content not in other:
            # Fine if the mixture added the token, or if it only names an entry of the vocabulary.
            index = mine[content]["id"]
            if index in manifest.tokenizer.new_ids or known.get(content) == index:
                continue
        changes.append(
            f"{content!r} is {mine.get(content, 'absent')} and {other.get(content, 'absent')}"
        )
    if not changes:
        return []
    shown = ", ".join(changes[:_SHOWN])
    return [f"{len(changes):,} added tokens differ (shards, model: {shown})"]


def _added(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return content -> id and how it is matched; the flag `special` does not affect ids."""
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
            f"{path} is not readable as JSON: {one_line(exc)}; replace it with a complete file"
        ) from exc
    if not isinstance(data, dict):
        raise ArtifactError(
            f"{path} holds a {type(data).__name__}, not the object that a tokenizer.json is;"
            " replace it with the right file"
        )
    return data


def _shown(steps: list[Any]) -> str:
    return shorten(json.dumps(steps, ensure_ascii=False), 120)
