"""Shard sets spelled as text, for tests of what shows them.

Their tokenizer is byte-level, with a token for each byte.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import zstandard
from lettered_sets import write_lettered_set

from shared.shard_reader import ShardSet, open_shard_set

EOS = "<|end|>"


def byte_tokenizer(*merges: tuple[str, str]) -> tokenizers.Tokenizer:
    """A byte-level tokenizer with a token for each byte, one for each of `merges`, and EOS (without
    merges, 256)."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    vocab |= {"".join(pair): 256 + index for index, pair in enumerate(merges)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return tokenizer


Part = tuple[str, str, str]  # text, the letter of its kind, 0 or 1 for trained


def write_text_set(path: Path, *parts: Part, **options: Any) -> ShardSet:
    """One pack with one sequence."""
    return write_text_pack(path, [parts], **options)


def write_text_pack(
    path: Path,
    sequences: Sequence[Sequence[Part]],
    *,
    tokenizer: Any = None,
    max_seq_len: int = 200,
    **options: Any,
) -> ShardSet:
    """One pack of sequences; further options are those of a lettered set."""
    tokenizer = tokenizer or byte_tokenizer()
    ids: list[int] = []
    pack = []
    for parts in sequences:
        letters = digits = ""
        for text, letter, digit in parts:
            part = tokenizer.encode(text).ids
            ids += part
            letters += letter * len(part)
            digits += digit * len(part)
        pack.append((letters, digits))
    write_lettered_set(
        path,
        [[pack]],
        tokens=ids,
        tokenizer_json=tokenizer.to_str().encode(),
        max_seq_len=max_seq_len,
        **options,
    )
    return open_shard_set(path)


def write_rejected_row_set(path: Path) -> ShardSet:
    """Two shards of two packs with rows 0 to 5 of `chats`; row 7 is listed as malformed."""
    packs = [[("tuaT", "0011"), ("tuaaT", "00111")], [("tutaT", "00011")]]
    write_lettered_set(path, [packs, packs], tokenizer_json=byte_tokenizer().to_str().encode())
    event = {
        "source": "chats",
        "row": 7,
        "reason": "malformed",
        "detail": "chats.jsonl line 8 (row 7): no\x1b",
    }
    (path / "rejects.jsonl.zst").write_bytes(zstandard.compress(json.dumps(event).encode() + b"\n"))
    return open_shard_set(path)
