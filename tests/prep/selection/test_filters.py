"""Filters and duplicates: what is left out, why, and that it is listed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows

from prep.config import MixtureConfig
from prep.selection.filters import without_duplicates
from prep.selection.sequences import SEQUENCE, EligibleRows
from prep.store.sample_store import SampleStore, StoredChunk
from shared import config
from shared.errors import ConfigError
from shared.shard_reader import ShardSet


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def rejects(shards: ShardSet) -> list[dict[str, Any]]:
    text = zstandard.decompress((shards.path / "rejects.jsonl.zst").read_bytes()).decode()
    return [json.loads(line) for line in text.split("\n") if line]


def rows_used(shards: ShardSet) -> list[tuple[int, int]]:
    """Return (source, row) of every sequence, in order."""
    origin = np.concatenate([shard["seq_origin"] for shard in shards.shards])
    return sorted((int(source), int(row)) for source, row, _ in origin)


# duplicates


def eligible_of(
    root: Path, contents: list[list[int]], fragments: list[list[int]]
) -> tuple[EligibleRows, SampleStore]:
    """Return chunks of samples with these contents; a sample gives as many sequences as `fragments`
    says."""
    chunks, rows = [], []
    for index, values in enumerate(contents):
        folder = root / f"chunk-{index:05d}"
        folder.mkdir(parents=True)
        hashes = np.zeros((len(values), 16), np.uint8)
        hashes[:, 15] = np.asarray(values) % 3  # some differ in one half of the hash only
        hashes[:, 0] = np.asarray(values) // 3
        np.save(folder / "content_hash.npy", hashes)
        chunks.append(StoredChunk(folder))
        for sample, count in enumerate(fragments[index]):
            rows += [(index, sample, 1000 * index + sample)] * count
    sequences = np.zeros(len(rows), SEQUENCE)
    for name, column in zip(("chunk", "sample", "row"), zip(*rows, strict=True), strict=False):
        sequences[name] = column
    return EligibleRows(sequences), SampleStore(root, tuple(chunks))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), max_size=5),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_of_equal_rows_the_first_stays(
    tmp_path_factory: pytest.TempPathFactory, sources: list[list[list[tuple[int, int]]]]
) -> None:
    root = tmp_path_factory.mktemp("stores")
    made = [
        eligible_of(
            root / str(i),
            [[c for c, _ in chunk] for chunk in chunks],
            [[f for _, f in c] for c in chunks],
        )
        for i, chunks in enumerate(sources)
    ]
    names = [f"source{i}" for i in range(len(sources))]
    filtered = without_duplicates([u for u, _ in made], [s for _, s in made], names)
    seen: dict[int, str] = {}
    for index, chunks in enumerate(sources):
        rows_left, listed = [], []
        for number, chunk in enumerate(chunks):
            for sample, (content, fragments) in enumerate(chunk):
                row = 1000 * number + sample
                if fragments and content in seen:
                    listed.append((row, "duplicate", f"the same as {seen[content]}"))
                elif fragments:
                    seen[content] = f"row {row} of {names[index]}"
                    rows_left += [row] * fragments
        assert filtered[index].rows["row"].tolist() == rows_left
        assert filtered[index].listed == listed
        assert filtered[index].dropped["duplicate"] == len(listed)


def test_equal_messages_with_other_tools_are_no_duplicates(tmp_path: Path, tokenizer: Path) -> None:
    row, tool = chat("a", "b"), {"type": "function", "function": {"name": "add"}}
    unlike = [row, {**row, "tools": [tool]}, chat("a", "b "), chat("a", "b", system="s")]
    first = write_rows(tmp_path / "first.jsonl", [*unlike, row])
    second = write_rows(tmp_path / "second.jsonl", [chat("c", "d"), row])
    tables = mixture_of([first, second], tokenizer)
    assert len(rows_used(build_set(tables, tmp_path / "all", store=tmp_path / "s"))) == 7
    tables["dedup"] = {"exact": True}
    shards = build_set(tables, tmp_path / "once", store=tmp_path / "s")
    assert rows_used(shards) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert [source.rows_dropped for source in shards.manifest.sources] == [
        {"duplicate": 1},
        {"duplicate": 1},
    ]
    assert [(e["source"], e["row"], e["detail"]) for e in rejects(shards)] == [
        ("first", 4, "the same as row 0 of first"),
        ("second", 1, "the same as row 0 of first"),
    ]


def test_a_row_that_its_source_filters_out_hides_no_copy_elsewhere(
    tmp_path: Path, tokenizer: Path
) -> None:
    long = chat("What is 2 + 2?", "The answer is 4. " * 5)
    first = write_rows(tmp_path / "first.jsonl", [long, chat("a", "b")])
    second = write_rows(tmp_path / "second.jsonl", [long])
    sources = [{"path": str(first), "max_tokens": 20}, {"path": str(second)}]
    shards = build_set(mixture_of(sources, tokenizer, dedup={"exact": True}), tmp_path / "out")
    assert rows_used(shards) == [(0, 1), (1, 0)]


# lengths


def test_length_filters_keep_their_bounds_and_count_the_rest(
    tmp_path: Path, tokenizer: Path
) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [chat("What?", "The answer is 4. " * n) for n in range(1, 30)]
    )
    whole = build_set(
        mixture_of([rows], tokenizer, max_seq_len=512), tmp_path / "a", store=tmp_path / "s"
    )
    offsets = np.concatenate([np.diff(shard["seq_offsets"]) for shard in whole.shards])
    tokens = dict(
        zip(
            np.concatenate([s["seq_origin"][:, 1] for s in whole.shards]).tolist(),
            offsets,
            strict=True,
        )
    )
    low, high = sorted(tokens.values())[5], sorted(tokens.values())[20]
    source = {"path": str(rows), "min_tokens": int(low), "max_tokens": int(high)}
    for over_length in ("truncate", "split", "error"):
        tables = mixture_of(
            [source], tokenizer, max_seq_len=512, lengths={"over_length": over_length}
        )
        shards = build_set(tables, tmp_path / over_length, store=tmp_path / "s")
        assert {row for _, row in rows_used(shards)} == {
            row for row, n in tokens.items() if low <= n <= high
        }
        assert shards.manifest.sources[0].rows_dropped == {
            "under_min_tokens": 5,
            "over_max_tokens": 8,
        }
        assert {event["reason"] for event in rejects(shards)} == {
            "under_min_tokens",
            "over_max_tokens",
        }


def test_a_source_that_filters_its_longest_rows_has_none_that_is_too_long(
    tmp_path: Path, tokenizer: Path
) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [chat("a", "b"), chat("a", "The answer is 4. " * 50)]
    )
    tables = mixture_of([{"path": str(rows), "max_tokens": 64}], tokenizer, max_seq_len=64)
    shards = build_set({**tables, "lengths": {"over_length": "error"}}, tmp_path / "out")
    assert shards.manifest.sources[0].rows_dropped == {"over_max_tokens": 1}


def test_min_loss_tokens_of_one_source_leaves_the_others_alone(
    tmp_path: Path, tokenizer: Path
) -> None:
    rows = [chat("What?", "4"), chat("What?", "The answer is 4, and thanks for all the fish.")]
    first, second = (write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("first", "second"))
    sources = [{"path": str(first), "min_loss_tokens": 6}, {"path": str(second)}]
    shards = build_set(mixture_of(sources, tokenizer), tmp_path / "out")
    assert rows_used(shards) == [(0, 1), (1, 0), (1, 1)]
    assert shards.manifest.sources[0].rows_dropped == {"under_min_loss_tokens": 1}


@pytest.mark.parametrize("over_length", ["truncate", "split"])
def test_min_loss_tokens_counts_all_sequences_of_a_row(
    tmp_path: Path, tokenizer: Path, over_length: str
) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [chat("What?", "The answer is 4. " * n) for n in range(1, 20)]
    )
    common = {"max_seq_len": 32, "lengths": {"over_length": over_length, "min_loss_tokens": 0}}
    whole = build_set(mixture_of([rows], tokenizer, **common), tmp_path / "a", store=tmp_path / "s")
    loss_tokens: dict[int, int] = {}
    for shard in whole.shards:
        loss = np.add.reduceat(shard["loss_mask"].astype(np.int64), shard["seq_offsets"][:-1])
        for row, count in zip(shard["seq_origin"][:, 1].tolist(), loss.tolist(), strict=True):
            loss_tokens[row] = loss_tokens.get(row, 0) + count
    least = sorted(loss_tokens.values())[3]
    source = {"path": str(rows), "min_loss_tokens": least}
    shards = build_set(
        mixture_of([source], tokenizer, **common), tmp_path / "b", store=tmp_path / "s"
    )
    assert {row for _, row in rows_used(shards)} == {
        row for row, count in loss_tokens.items() if count >= least
    }
    under = sum(count < least for count in loss_tokens.values())
    assert under > 0
    assert shards.manifest.sources[0].rows_dropped == {"under_min_loss_tokens": under}


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"mixing": {"temperature": 0}}, "temperature = 0.0; expected more than 0"),
        ({"mixing": {"max_epochs": 2}}, "max_epochs is set but no temperature"),
        ({"mixing": {"temperature": 2, "max_epochs": 0.5}}, "max_epochs = 0.5; expected 1 or more"),
        (
            {"mixing": {"temperature": 2}, "sources": [{"path": "x", "rows": 3}]},
            "sources.0.rows is set, and so is",
        ),
        (
            {"mixing": {"temperature": 1}, "sources": [{"path": "x", "fraction": 1.0}]},
            "sources.0.fraction is set",
        ),
        (
            {"sources": [{"path": "x", "min_tokens": 9, "max_tokens": 8}]},
            "min_tokens = 9 is over max_tokens = 8",
        ),
        ({"sources": [{"path": "x", "max_tokens": 0}]}, "max_tokens = 0; expected 1 or more"),
        ({"decontaminate": {"ngram": 0}}, "ngram = 0; expected 1 or more words"),
        ({"decontaminate": {"fields": ["q"]}}, "fields are given but no files"),
        ({"decontaminate": {"file": ["q"]}}, "'decontaminate.file'; did you mean 'files'"),
        ({"dedup": {"exact": "yes"}}, "dedup.exact = 'yes'; expected true or false"),
    ],
)
def test_what_cannot_be_meant_is_a_config_error(tables: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        config.build(
            MixtureConfig, {**mixture_of([Path("x.jsonl")], Path("t")), **tables}, "test.toml"
        )
