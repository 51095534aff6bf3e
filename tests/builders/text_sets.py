"""Shard sets spelled as text, for tests of what shows them: a byte-level tokenizer with a token for
each byte."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
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
