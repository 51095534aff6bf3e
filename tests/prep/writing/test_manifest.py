"""The numbers of a manifest are those that its shards and its rows tell."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows

from shared.shard_format import KIND_MASK, Kind
from shared.shard_reader import ShardSet


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def build_with(
    over_length: str, epochs: float, tokenizer: Path, folder: Path, **tables: Any
) -> ShardSet:
    """Build rows of all fates: short, long, malformed, unrendered, repeated."""
    rows: list[Any] = [chat(f"Is {n} even?", "No.", "Why?", "So. " * 3 * n) for n in range(12)]
    rows += ["{", {"messages": "none"}, {"messages": [{"role": "user", "content": "x", "name": 1}]}]
    rows += [{"messages": [*chat("a", "b")["messages"], {"role": "tool", "content": "1"}]}] * 2
    source = {"path": str(write_rows(folder / "rows.jsonl", rows)), "epochs": epochs}
    return build_set(
        mixture_of(
            [source], tokenizer, template="tulu", max_seq_len=64,
            lengths={"over_length": over_length, "min_loss_tokens": 0},
            rows={"on_error": "skip", "reject_budget": 0.9, "max_unrendered": 0.9}, **tables,
        ),
        folder / "out",
    )  # fmt: skip


@pytest.mark.parametrize("epochs", [1, 2.5])
@pytest.mark.parametrize("over_length", ["truncate", "truncate_turns", "drop", "split"])
def test_the_counts_of_a_source_are_those_of_its_rows_and_shards(
    over_length: str, epochs: float, tokenizer: Path, tmp_path: Path
) -> None:
    shards = build_with(over_length, epochs, tokenizer, tmp_path)
    (entry,) = shards.manifest.sources
    pieces: dict[int, list[tuple[int, int, bool]]] = {}  # row -> (first, end, ends in a terminator)
    for shard in shards.shards:
        for (start, end), (_, row, first) in zip(
            pairwise(shard["seq_offsets"].tolist()), shard["seq_origin"].tolist(), strict=True
        ):
            trained = np.flatnonzero(shard["loss_mask"][start:end])
            kinds = shard["kind"][start:end] & KIND_MASK
            ended = len(trained) > 0 and kinds[trained[-1]] == Kind.TERMINATOR
            pieces.setdefault(row, []).append((first, first + end - start, bool(ended)))
    assert entry.rows_read == 17
    assert entry.rows_rejected == {"malformed": 3}
    assert entry.rows_unrendered == {"tool message": 2}
    assert entry.rows_used == len(pieces)
    assert entry.rows_used + sum(entry.rows_dropped.values()) == 12
    last = {row: max(parts) for row, parts in pieces.items()}
    assert entry.rows_without_terminator == sum(not ended for _, _, ended in last.values())
    assert entry.tokens == sum(len(shard["tokens"]) for shard in shards.shards)
    assert entry.loss_tokens == sum(int(shard["loss_mask"].sum()) for shard in shards.shards)
    assert entry.details["sequences"] == sum(len(parts) for parts in pieces.values())
    several = sum(len({first for first, *_ in parts}) > 1 for parts in pieces.values())
    assert entry.details["rows_split"] == (several if over_length == "split" else 0)
    assert (entry.rows_truncated > 0) == over_length.startswith("truncate")


def test_totals_and_terminators_are_those_of_the_columns(tokenizer: Path, tmp_path: Path) -> None:
    shards = build_with("split", 1, tokenizer, tmp_path)
    manifest, (shard,) = shards.manifest, shards.shards
    num_packs = len(shard["pack_offsets"]) - 1
    assert manifest.totals.packs == num_packs
    assert manifest.totals.sequences == len(shard["seq_offsets"]) - 1
    assert manifest.totals.tokens == len(shard["tokens"])
    assert manifest.totals.density == len(shard["tokens"]) / (num_packs * 64)
    ends = (shard["kind"] & KIND_MASK == Kind.TERMINATOR) & (shard["loss_mask"] == 1)
    assert set(manifest.tokenizer.terminator_ids) == set(shard["tokens"][ends].tolist())
    assert manifest.max_token_id == shard["tokens"].max()
    assert manifest.kinds == {kind.name.lower(): int(kind) for kind in Kind}
