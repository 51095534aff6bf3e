"""Shard sets spelled as strings, for tests of what looks at them: one letter per token says its
kind.

t template, s system, u user, a assistant, T terminator, c tool call, o tool, r reasoning; a capital
A, U, R or C straddles. A mask is a string of 0 and 1; a pack is a list of (kinds, mask).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared import atomic, config
from shared.hashing import digest, sha256_bytes
from shared.shard_format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    STRADDLES,
    TOKENIZER_DIR,
    FileEntry,
    Kind,
    Manifest,
    SourceEntry,
    TemplateEntry,
    TokenizerEntry,
    Totals,
    fingerprint_of,
)
from shared.shard_writer import write_shard

LETTERS = {
    "t": Kind.TEMPLATE,
    "s": Kind.SYSTEM,
    "u": Kind.USER,
    "a": Kind.ASSISTANT,
    "T": Kind.TERMINATOR,
    "c": Kind.TOOL_CALL,
    "o": Kind.TOOL,
    "r": Kind.REASONING,
}
for _letter in "aurc":
    LETTERS[_letter.upper()] = LETTERS[_letter] | STRADDLES  # type: ignore[assignment]

Pack = Sequence[tuple[str, str]]
Columns = dict[str, Any]


def kinds_of(letters: str) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.array([LETTERS[letter] for letter in letters], np.uint8)


def mask_of(digits: str) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.array([int(digit) for digit in digits], np.uint8)


def columns_of(packs: Sequence[Pack], *, tokens: Sequence[int] | None, first_row: int) -> Columns:
    sequences = [sequence for pack in packs for sequence in pack]
    mask = mask_of("".join(digits for _, digits in sequences))
    lengths = [len(letters) for letters, _ in sequences]
    return {
        "tokens": np.array(tokens if tokens is not None else np.arange(sum(lengths)) % 50, "<i4"),
        "loss_mask": mask,
        "kind": kinds_of("".join(letters for letters, _ in sequences)),
        "seq_offsets": np.cumsum([0, *lengths], dtype="<i8"),
        "pack_offsets": np.cumsum([0, *map(len, packs)], dtype="<i8"),
        "pack_loss_tokens": np.array([sum(d.count("1") for _, d in pack) for pack in packs], "<i4"),
        "seq_origin": (
            np.array([(0, first_row + index, 0) for index in range(len(sequences))], "<i8").reshape(
                -1, 3
            )
        ),
    }


def write_lettered_set(
    path: Path,
    shards: Sequence[Sequence[Pack]],
    *,
    tokens: Sequence[int] | None = None,
    tokenizer_json: bytes = b"{}",
    settings: dict[str, Any] | None = None,
    details: dict[str, Any] | None = None,
    max_seq_len: int = 16,
    spoil: Callable[[Columns], None] | None = None,
    declare: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Write a set whose hashes hold. `spoil` changes the columns of shard 0 first; `declare`
    changes the manifest."""
    written, parts, row = [], [], 0
    for index, packs in enumerate(shards):
        columns = columns_of(packs, tokens=tokens if index == 0 else None, first_row=row)
        row += len(columns["seq_origin"])
        if spoil is not None and index == 0:
            spoil(columns)
        written.append(write_shard(path, index, columns))
        parts.append(columns)
    (path / TOKENIZER_DIR).mkdir()
    (path / TOKENIZER_DIR / "tokenizer.json").write_bytes(tokenizer_json)
    files = {
        "tokenizer.json": FileEntry(bytes=len(tokenizer_json), sha256=sha256_bytes(tokenizer_json))
    }
    sums = {
        key: sum(getattr(shard, key) for shard in written)
        for key in ("packs", "sequences", "tokens", "loss_tokens")
    }
    source = SourceEntry(
        name="chats",
        hub_id=None,
        revision=None,
        content_sha256=None,
        rows_read=row + 2,
        rows_used=row,
        rows_rejected={"malformed": 1},
        rows_unrendered={},
        rows_dropped={"over_length": 1},
        rows_truncated=0,
        rows_without_terminator=0,
        tokens=sums["tokens"],
        loss_tokens=sum(int(p["loss_mask"].sum()) for p in parts),
        details=details or {},
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="lettered",
        fingerprint=fingerprint_of(
            max_seq_len=max_seq_len,
            tokenizer_files=files,
            template_sha256="0" * 64,
            source_names=["chats"],
            shards=written,
        ),
        inputs_digest=digest({}),
        inputs={},
        config=settings
        if settings is not None
        else {"mask": {"train_on": "assistant", "boundary": "overlap"}},
        recipe="",
        tokenizer=TokenizerEntry(
            name="none",
            revision=None,
            files=files,
            vocab_size=300,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            terminator_ids=(),
            canary_ids=(),
            new_ids=(),
        ),
        chat_template=TemplateEntry(name="none", sha256="0" * 64, split_markers={}),
        kinds={kind.name.lower(): int(kind) for kind in Kind},
        max_seq_len=max_seq_len,
        max_token_id=max(int(part["tokens"].max()) for part in parts),
        sources=(source,),
        totals=Totals(density=sums["tokens"] / (sums["packs"] * max_seq_len), **sums),
        shards=tuple(written),
    )
    plain = config.to_plain(manifest)
    if declare is not None:
        declare(plain)
    atomic.write_json(path / MANIFEST_NAME, {**plain, "seal": digest(plain)})
    return path
