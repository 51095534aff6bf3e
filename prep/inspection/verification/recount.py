"""Work the values of a manifest out again from the set's other files: an edited manifest that was
sealed again is caught.

Only sets that `sft-prep build` made can be checked: their `inputs` hold the configuration of the
build.
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

Values = dict[str, tuple[Any, Any]]  # name -> (what the manifest states, what the files give)


def recount(shard_set: ShardSet) -> str:
    """Return in a few words what was checked. Raises ArtifactError for the first wrong value."""
    manifest, inputs, where = shard_set.manifest, shard_set.manifest.inputs, shard_set.path
    if "config" not in inputs:
        return "not checked: the manifest's inputs are not those of a build"
    try:
        config = inputs["config"]
        suffix = "-eval" if inputs.get("part") == EVAL_DIR else ""
        tokenizer, template = manifest.tokenizer, manifest.chat_template
        # What the manifest repeats from its inputs, then what its other files give.
        values: Values = {
            "config": (manifest.config, config),
            "name": (manifest.name, config["name"] + suffix),
            "recipe": (manifest.recipe, config["recipe"]),
            "max_seq_len": (manifest.max_seq_len, config["max_seq_len"]),
            "inputs.format_version": (inputs["format_version"], FORMAT_VERSION),
            "tokenizer.name": (tokenizer.name, config["tokenizer"]["name"]),
            "tokenizer.revision": (tokenizer.revision, inputs["tokenizer"]["revision"]),
            "chat_template.name": (template.name, config["template"]["name"]),
            "inputs.template": (inputs["template"], template.sha256),
            "kinds": (manifest.kinds, {kind.name.lower(): int(kind) for kind in Kind}),
            **_from_files(shard_set),
        }
        for name, (stated, expected) in values.items():
            if canonical_json(stated) != canonical_json(expected):
                raise ArtifactError(
                    f"{where}: {name} is {stated!r}, the set's files give {expected!r}; build it"
                    " again"
                )
        for source in manifest.sources:
            _check_rows(source, where)
    except SftError:
        raise
    # `inputs` may hold anything: where it lacks the expected shape, it is not from a build.
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError) as exc:
        raise ArtifactError(
            f"{where}: the manifest's inputs are not those of a build ({exc!r}); build it again"
        ) from exc
    return f"{len(values)} values and the rows of every source follow from the files"


def _from_files(shard_set: ShardSet) -> Values:
    """Compare the tokenizer's entry with the tokenizer, and its terminators with the columns."""
    from tokenizers import Tokenizer

    folder, entry = shard_set.tokenizer_dir, shard_set.manifest.tokenizer
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as exc:  # the Rust binding raises plain Exception
        raise ArtifactError(
            f"{file} cannot be read as a tokenizer ({exc}); build the set again"
        ) from exc
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    canary_ids = tokenizer.encode(CANARY_TEXT, add_special_tokens=False).ids
    template_sha256 = entry.files["chat_template.jinja"].sha256
    # The terminators are the added tokens that end trained turns, the most frequent first.
    is_added = np.zeros(shard_set.manifest.max_token_id + 1, np.bool_)
    for token in tokenizer.get_added_tokens_decoder():
        is_added[token : token + 1] = True  # nothing where the id is beyond all that occur
    counts = Counter[int]()
    for shard in shard_set.shards:
        counts.update(count_terminators(shard, is_added))
    terminators = sorted(counts, key=lambda token: (-counts[token], token))
    values: Values = {
        "tokenizer.vocab_size": (entry.vocab_size, vocab_size),
        "tokenizer.canary_ids": (list(entry.canary_ids), canary_ids),
        "chat_template.sha256": (shard_set.manifest.chat_template.sha256, template_sha256),
        "tokenizer.terminator_ids": (list(entry.terminator_ids), terminators),
    }
    special_tokens = json.loads((folder / "tokenizer_config.json").read_bytes())
    for name in ("bos", "eos", "pad"):
        token = special_tokens.get(f"{name}_token")
        token_id = None if token is None else tokenizer.token_to_id(token)
        values[f"tokenizer.{name}_token_id"] = (getattr(entry, f"{name}_token_id"), token_id)
    return values


def _check_rows(source: SourceEntry, where: object) -> None:
    """Raise ArtifactError for counts of rows that contradict each other."""
    reasons = [source.rows_rejected, source.rows_unrendered, source.rows_dropped]
    if any(count < 0 for counts in reasons for count in counts.values()):
        raise ArtifactError(
            f"{where}: source {source.name!r} counts fewer than 0 rows for a reason; build it again"
        )
    # No equality: a row that was left out fragment by fragment is counted under none of them.
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
                f" {source.rows_used} rows used; build it again"
            )
