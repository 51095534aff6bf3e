"""What a manifest says of its own set, found again in its files: one that was sealed again gives
itself away.

Only sets that `sft-prep build` made can be held to this: their `inputs` hold the build's
configuration.
"""

import json
from collections import Counter
from typing import Any

import numpy as np

from prep.tokenization.tokenizer import CANARY_TEXT
from prep.writing.columns import count_terminators
from shared.errors import ArtifactError, SftError
from shared.hashing import canonical_json
from shared.shard_format import EVAL_DIR, FORMAT_VERSION, Kind, SourceEntry
from shared.shard_reader import ShardSet

_PER_FRAGMENT = "fragments_with_few_loss_tokens"  # counts fragments, not rows


def recount(shard_set: ShardSet) -> str:
    """Return in a few words what was found again. Raises ArtifactError for the first word that does
    not hold."""
    if "config" not in shard_set.manifest.inputs:
        return "not found again: the manifest's inputs are not those of a build"
    where = shard_set.path
    try:
        tokenizer = _tokenizer(shard_set)
        found = _from_inputs(shard_set)
        found |= {**_from_tokenizer(shard_set, tokenizer), **_from_columns(shard_set, tokenizer)}
        for name, (said, expected) in found.items():
            if canonical_json(said) != canonical_json(expected):
                raise ArtifactError(
                    f"{where}: {name} is {said!r}, the set's files say {expected!r}; build it again"
                )
        for source in shard_set.manifest.sources:
            _check_rows(source, where)
    except SftError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError) as exc:
        raise ArtifactError(
            f"{where}: the manifest's inputs are not those of a build ({exc!r}); build it again"
        ) from exc
    return f"{len(found)} words and the rows of every source follow from the files"


def _from_inputs(shard_set: ShardSet) -> dict[str, tuple[Any, Any]]:
    manifest, inputs = shard_set.manifest, shard_set.manifest.inputs
    asked = inputs["config"]
    is_eval = inputs.get("part") == EVAL_DIR
    return {
        "config": (manifest.config, asked),
        "name": (manifest.name, f"{asked['name']}-eval" if is_eval else asked["name"]),
        "recipe": (manifest.recipe, asked["recipe"]),
        "max_seq_len": (manifest.max_seq_len, asked["max_seq_len"]),
        "inputs.format_version": (inputs["format_version"], FORMAT_VERSION),
        "tokenizer.name": (manifest.tokenizer.name, asked["tokenizer"]["name"]),
        "tokenizer.revision": (manifest.tokenizer.revision, inputs["tokenizer"]["revision"]),
        "chat_template.name": (manifest.chat_template.name, asked["template"]["name"]),
        "inputs.template": (inputs["template"], manifest.chat_template.sha256),
        "kinds": (manifest.kinds, {kind.name.lower(): int(kind) for kind in Kind}),
    }


def _tokenizer(shard_set: ShardSet) -> Any:
    from tokenizers import Tokenizer

    file = shard_set.tokenizer_dir / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file))
    except Exception as exc:  # what tokenizers raises has no name of its own
        raise ArtifactError(f"{file} makes no tokenizer ({exc}); build the set again") from exc


def _from_tokenizer(shard_set: ShardSet, tokenizer: Any) -> dict[str, tuple[Any, Any]]:
    folder, entry = shard_set.tokenizer_dir, shard_set.manifest.tokenizer
    named = json.loads((folder / "tokenizer_config.json").read_bytes())
    found = {
        "tokenizer.vocab_size": (
            entry.vocab_size,
            max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        ),
        "tokenizer.canary_ids": (
            list(entry.canary_ids),
            tokenizer.encode(CANARY_TEXT, add_special_tokens=False).ids,
        ),
        "chat_template.sha256": (
            shard_set.manifest.chat_template.sha256,
            entry.files["chat_template.jinja"].sha256,
        ),
    }
    for name in ("bos", "eos", "pad"):
        token = named.get(f"{name}_token")
        expected = None if token is None else tokenizer.token_to_id(token)
        found[f"tokenizer.{name}_token_id"] = (getattr(entry, f"{name}_token_id"), expected)
    return found


def _from_columns(shard_set: ShardSet, tokenizer: Any) -> dict[str, tuple[Any, Any]]:
    counts = Counter[int]()
    is_added = np.zeros(shard_set.manifest.max_token_id + 1, np.bool_)
    is_added[[token for token in tokenizer.get_added_tokens_decoder() if token < len(is_added)]] = (
        True
    )
    for shard in shard_set.shards:
        counts.update(count_terminators(shard, is_added))
    ends = sorted(counts, key=lambda token: (-counts[token], token))
    return {"tokenizer.terminator_ids": (list(shard_set.manifest.tokenizer.terminator_ids), ends)}


def _check_rows(source: SourceEntry, where: object) -> None:
    reasons = [source.rows_rejected, source.rows_unrendered, source.rows_dropped]
    if any(count < 0 for counts in reasons for count in counts.values()):
        raise ArtifactError(
            f"{where}: source {source.name!r} counts fewer than 0 rows for a reason; build it again"
        )
    left_out = sum(
        count for counts in reasons for reason, count in counts.items() if reason != _PER_FRAGMENT
    )
    if source.rows_used + left_out > source.rows_read:
        raise ArtifactError(
            f"{where}: source {source.name!r} has rows_read = {source.rows_read}, but"
            f" {source.rows_used} rows used and {left_out} left out; build it again"
        )
    for name in ("rows_truncated", "rows_without_terminator"):
        if not 0 <= getattr(source, name) <= source.rows_used:
            raise ArtifactError(
                f"{where}: source {source.name!r} has {name} = {getattr(source, name)} of"
                f" {source.rows_used} rows used"
            )
