"""Tiny shard sets for tests, written with the real writer."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from shared import atomic
from shared.hashing import digest, sha256_bytes
from shared.shard_format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_DIR,
    FileEntry,
    Kind,
    Manifest,
    ShardEntry,
    SourceEntry,
    TemplateEntry,
    TokenizerEntry,
    Totals,
    fingerprint_of,
    sealed,
)
from shared.shard_writer import write_shard


def random_packs(
    *, num_packs: int, max_seq_len: int, vocab_size: int, seed: int = 0, loss_fraction: float = 0.5
) -> list[list[tuple[list[int], list[int]]]]:
    """Return packs of sequences (tokens, loss mask) of 2 tokens or more; packs are nearly full."""
    rng = np.random.default_rng(seed)
    packs = []
    for _ in range(num_packs):
        sequences, room = [], max_seq_len
        while room >= 2:
            length = int(min(room, rng.integers(2, max(3, max_seq_len // 2))))
            tokens = rng.integers(0, vocab_size, length).tolist()
            mask = (rng.random(length) < loss_fraction).astype(int).tolist()
            sequences.append((tokens, [0, *mask[1:]]))
            room -= length
        packs.append(sequences)
    return packs


def word_tokenizer(vocab_size: int) -> dict[str, bytes]:
    """Return the files of a tokenizer whose word N is token N, with a chat template."""
    words = {f"w{index}": index for index in range(vocab_size)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w1"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": None,
        "model": model,
        "added_tokens": [{"id": 0, "content": "w0", "special": True, **flags}],
    }
    template = "{% for message in messages %}{{ message['content'] }} w0 {% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0"}
    settings["chat_template"] = template
    return {
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def empty_source(name: str) -> SourceEntry:
    """Return a further source of a set; the first one has the totals of all."""
    return SourceEntry(
        name=name,
        hub_id=None,
        revision=None,
        content_sha256=None,
        rows_read=0,
        rows_used=0,
        rows_rejected={},
        rows_unrendered={},
        rows_dropped={},
        rows_truncated=0,
        rows_without_terminator=0,
        tokens=0,
        loss_tokens=0,
    )


def write_shard_set(
    path: Path,
    packs: Sequence[Sequence[tuple[list[int], list[int]]]],
    *,
    max_seq_len: int,
    vocab_size: int,
    recipe: str = "",
    packs_per_shard: int = 1000,
    tokenizer_files: dict[str, bytes] | None = None,
    chat_template: bytes = b"",
    name: str = "tiny",
    origins: Sequence[Sequence[tuple[int, int, int]]] | None = None,
    source_names: Sequence[str] = ("made-up",),
    new_ids: tuple[int, ...] = (),
) -> Path:
    """Write a complete shard set of `packs` (sequences of tokens and loss mask) at `path`; return
    `path`."""
    path.mkdir(parents=True)
    files = {}
    for file_name, data in (tokenizer_files or word_tokenizer(vocab_size)).items():
        (path / TOKENIZER_DIR).mkdir(exist_ok=True)
        (path / TOKENIZER_DIR / file_name).write_bytes(data)
        files[file_name] = FileEntry(bytes=len(data), sha256=sha256_bytes(data))
    shards = _write_shards(path, packs, packs_per_shard, origins)
    totals = Totals(
        packs=len(packs),
        sequences=sum(shard.sequences for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        loss_tokens=sum(shard.loss_tokens for shard in shards),
        density=sum(shard.tokens for shard in shards) / (len(packs) * max_seq_len),
    )
    first = replace(
        empty_source(source_names[0]),
        rows_read=totals.sequences,
        rows_used=totals.sequences,
        tokens=totals.tokens,
        loss_tokens=totals.loss_tokens,
    )
    inputs = {"made": "by a test", "packs": len(packs)}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        fingerprint=fingerprint_of(
            max_seq_len=max_seq_len,
            tokenizer_files=files,
            template_sha256=sha256_bytes(chat_template),
            source_names=list(source_names),
            shards=shards,
        ),
        inputs_digest=digest(inputs),
        inputs=inputs,
        config={},
        recipe=recipe,
        tokenizer=TokenizerEntry(
            name="made-up",
            revision=None,
            files=files,
            vocab_size=vocab_size,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
            terminator_ids=(0,),
            canary_ids=(),
            new_ids=new_ids,
        ),
        chat_template=TemplateEntry(
            name="none", sha256=sha256_bytes(chat_template), split_markers={}
        ),
        kinds={kind.name.lower(): int(kind) for kind in Kind},
        sources=(first, *(empty_source(name) for name in source_names[1:])),
        max_seq_len=max_seq_len,
        max_token_id=max(max(ids) for pack in packs for ids, _ in pack),
        totals=totals,
        shards=tuple(shards),
    )
    atomic.write_json(path / MANIFEST_NAME, sealed(manifest))
    return path


def _write_shards(
    path: Path,
    packs: Sequence[Sequence[tuple[list[int], list[int]]]],
    packs_per_shard: int,
    origins: Sequence[Sequence[tuple[int, int, int]]] | None,
) -> list[ShardEntry]:
    """Write all columns; without `origins` sequences are rows 0, 1, ... of source 0."""
    shards, row = [], 0
    for index, start in enumerate(range(0, len(packs), packs_per_shard)):
        chosen = packs[start : start + packs_per_shard]
        sequences = [sequence for pack in chosen for sequence in pack]
        tokens = np.concatenate([np.array(ids, "<i4") for ids, _ in sequences])
        mask = np.concatenate([np.array(bits, "|u1") for _, bits in sequences])
        if origins is None:
            origin = np.array([(0, row + number, 0) for number in range(len(sequences))], "<i8")
        else:
            origin = np.array(
                [item for pack in origins[start : start + packs_per_shard] for item in pack], "<i8"
            )
        row += len(sequences)
        columns = {
            "tokens": tokens,
            "loss_mask": mask,
            "kind": np.where(mask, int(Kind.ASSISTANT), int(Kind.USER)).astype("|u1"),
            "seq_offsets": np.cumsum([0, *(len(ids) for ids, _ in sequences)], dtype="<i8"),
            "pack_offsets": np.cumsum([0, *(len(pack) for pack in chosen)], dtype="<i8"),
            "pack_loss_tokens": np.array(
                [sum(sum(bits) for _, bits in pack) for pack in chosen], "<i4"
            ),
            "seq_origin": origin.reshape(-1, 3),
        }
        shards.append(write_shard(path, index, columns))
    return shards
