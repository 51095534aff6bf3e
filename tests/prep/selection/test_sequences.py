"""Choosing rows: exact counts, no dependence on chunks, and each sequence is written once."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.config import LengthsConfig, MaskConfig, SourceConfig
from prep.selection.best_fit import pack_best_fit
from prep.selection.sequences import Selection, choose, eligible_sequences
from prep.store.chunk_builder import COLUMNS
from prep.store.sample_store import SampleStore, StoredChunk
from prep.writing.columns import assemble
from shared.errors import DataError
from shared.shard_format import COLUMNS as SHARD_COLUMNS
from shared.shard_format import Kind

MAX_SEQ_LEN = 16


def write_store(path: Path, samples: list[tuple[int, int]], chunk_sizes: list[int]) -> SampleStore:
    """Write samples (prompt tokens, answer tokens), cut into chunks; token ids tell the row and the
    position."""
    chunks, row = [], 0
    for index, size in enumerate(chunk_sizes):
        part = samples[row : row + size]
        folder = path / f"chunk-{index:05d}"
        folder.mkdir(parents=True)
        lengths = [prompt + answer for prompt, answer in part]
        kinds = [
            [int(Kind.USER)] * prompt
            + [int(Kind.ASSISTANT)] * (answer - 1)
            + [int(Kind.TERMINATOR)] * (answer > 0)
            for prompt, answer in part
        ]
        offsets = np.cumsum([0, *lengths])
        columns = {
            "tokens": [
                (row + i) * 1000 + at for i, length in enumerate(lengths) for at in range(length)
            ],
            "kind": [kind for sample in kinds for kind in sample],
            "sample_offsets": offsets,
            "sample_row": np.arange(row, row + len(part)) * 2,  # every other row was rejected
            "sample_messages": 2 * np.arange(len(part) + 1),
            "message_offsets": [
                int(offsets[i]) + at for i, (prompt, _) in enumerate(part) for at in (0, prompt)
            ],
            "message_role": [int(Kind.USER), int(Kind.ASSISTANT)] * len(part),
            "message_train": [2, 2] * len(part),
            "prompt_hash": np.zeros((len(part), 16)),
            "content_hash": np.zeros((len(part), 16)),
        }  # fmt: skip
        for name, values in columns.items():
            dtype, tail = COLUMNS[name]
            np.save(folder / f"{name}.npy", np.asarray(values).astype(dtype).reshape(-1, *tail))
        (folder / "facts.json").write_text(json.dumps({}))
        chunks.append(StoredChunk(folder))
        row += size
    return SampleStore(path, tuple(chunks))


def select_from(
    store: SampleStore,
    *,
    seed: int = 0,
    name: str = "s",
    lengths: LengthsConfig | None = None,
    policy: MaskConfig | None = None,
    **source: float,
) -> Selection:
    config = SourceConfig(path="x", **source)
    rows = eligible_sequences(
        store,
        config,
        name,
        lengths=lengths or LengthsConfig(),
        mask=policy or MaskConfig(),
        max_seq_len=MAX_SEQ_LEN,
        seed=seed,
    )
    return choose(rows, config, name, seed=seed)


SAMPLES = [(2 + i % 5, 1 + i % 4) for i in range(60)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    return write_store(tmp_path_factory.mktemp("store"), SAMPLES, [60])


@pytest.fixture(scope="module")
def cut_store(tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    return write_store(tmp_path_factory.mktemp("store"), SAMPLES, [0, 7, 1, 0, 30, 22])


CHOICES = st.one_of(
    st.builds(dict),
    st.builds(dict, fraction=st.floats(0.01, 1.0)),
    st.builds(dict, rows=st.integers(1, 60)),
    st.builds(dict, epochs=st.floats(0.1, 3.5)),
)


@given(choice=CHOICES, seed=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_the_choice_has_the_exact_count_and_does_not_depend_on_chunks(
    store: SampleStore, cut_store: SampleStore, choice: dict[str, float], seed: int
) -> None:
    selection, other = (
        select_from(store, seed=seed, **choice),
        select_from(cut_store, seed=seed, **choice),
    )
    names = ["row", "length", "full_length", "loss_tokens", "terminated", "tie_break"]
    assert selection.sequences[names].tolist() == other.sequences[names].tolist()
    assert (selection.dropped, selection.listed) == (other.dropped, other.listed)
    times = Counter(selection.sequences["row"].tolist())
    total = len(SAMPLES)
    if "rows" in choice:
        assert times.total() == choice["rows"]
    elif "fraction" in choice:
        assert times.total() == round(choice["fraction"] * total)
    else:
        epochs = choice.get("epochs", 1.0)
        assert times.total() == int(epochs) * total + round((epochs - int(epochs)) * total)
        assert set(times.values()) <= {int(epochs), int(epochs) + 1}
    assert selection.dropped["not_chosen"] == total - len(times)
    assert len(set(selection.sequences["tie_break"].tolist())) == len(selection.sequences)


def test_another_seed_or_source_name_chooses_other_rows(store: SampleStore) -> None:
    rows = [
        select_from(store, seed=seed, name=name, rows=20).sequences["row"].tolist()
        for seed, name in ((0, "s"), (1, "s"), (0, "t"))
    ]
    assert rows[0] != rows[1]
    assert rows[0] != rows[2]
    assert rows[0] == select_from(store, rows=20).sequences["row"].tolist()


def test_a_larger_fraction_keeps_the_rows_of_a_smaller_one(store: SampleStore) -> None:
    small, large = (
        set(select_from(store, fraction=f).sequences["row"].tolist()) for f in (0.3, 0.6)
    )
    assert small < large


def test_more_rows_than_there_are_is_an_error(store: SampleStore) -> None:
    with pytest.raises(DataError, match="only 60 rows can be used"):
        select_from(store, rows=61)


@pytest.mark.parametrize("over_length", ["drop", "truncate"])
def test_long_rows_are_dropped_or_cut_and_listed(over_length: str, tmp_path: Path) -> None:
    lengths = LengthsConfig(over_length=over_length)
    store = write_store(tmp_path, [(4, 4), (4, 20), (16, 4), (15, 1), (0, 0)], [2, 3])
    selection = select_from(store, lengths=lengths)
    if over_length == "drop":
        assert selection.sequences["row"].tolist() == [0, 6]
        assert selection.dropped == {"over_length": 2, "empty": 1}
        assert selection.listed == [
            (2, "over_length", "over 16 tokens"),
            (4, "over_length", "over 16 tokens"),
            (8, "empty", "renders to nothing"),
        ]
    else:
        assert selection.sequences["row"].tolist() == [0, 2, 6]
        assert selection.dropped == {"few_loss_tokens": 1, "empty": 1}
        assert (2, "truncated", "24 tokens cut to 16") in selection.listed
        assert selection.sequences["terminated"].tolist() == [True, False, True]
        assert selection.sequences["loss_tokens"].tolist() == [4, 12, 1]


@pytest.mark.parametrize("least", [0, 1, 3, 5])
def test_rows_with_too_few_loss_tokens_are_dropped(least: int, tmp_path: Path) -> None:
    store = write_store(tmp_path, [(3, answer) for answer in range(6)], [6])
    selection = select_from(store, lengths=LengthsConfig(min_loss_tokens=least))
    assert selection.sequences["loss_tokens"].tolist() == list(range(least, 6))
    assert selection.dropped["few_loss_tokens"] == least


def test_an_empty_row_is_dropped_even_where_no_loss_tokens_are_required(tmp_path: Path) -> None:
    store = write_store(tmp_path, [(0, 0), (3, 1)], [2])
    selection = select_from(store, lengths=LengthsConfig(min_loss_tokens=0))
    assert selection.sequences["row"].tolist() == [2]


@pytest.mark.parametrize("shard_tokens", [1, 40, 100, 10_000])
def test_every_sequence_is_written_once_within_the_bounds(
    shard_tokens: int, store: SampleStore, cut_store: SampleStore, tmp_path: Path
) -> None:
    stores = [store, cut_store]
    chosen = [
        select_from(store, epochs=1.5).sequences,
        select_from(cut_store, name="t", fraction=0.7).sequences,
    ]
    sequences = np.concatenate(chosen)
    source_of = np.repeat([0, 1], [len(part) for part in chosen])
    order, pack_offsets = pack_best_fit(
        sequences["length"].astype(np.int64), capacity=MAX_SEQ_LEN, tie_break=sequences["tie_break"]
    )
    copied: list[int] = []
    assembled = assemble(
        tmp_path,
        stores=stores,
        sequences=sequences[order],
        source_of=source_of[order],
        pack_offsets=pack_offsets,
        policy=MaskConfig(),
        is_added=np.ones(100_000, np.bool_),
        shard_tokens=shard_tokens,
        on_sequences=copied.append,
    )
    assert sum(copied) == len(sequences)
    seen: list[tuple[int, int, int]] = []
    for shard in assembled.shards:
        columns = {name: np.load(tmp_path / shard.path / f"{name}.npy") for name in SHARD_COLUMNS}
        bounds, packs = columns["seq_offsets"], columns["pack_offsets"]
        assert len(packs) == 2 or bounds[-1] <= shard_tokens
        assert (np.diff(bounds[packs]) <= MAX_SEQ_LEN).all()
        sums = [columns["loss_mask"][bounds[a] : bounds[b]].sum() for a, b in pairwise(packs)]
        assert columns["pack_loss_tokens"].tolist() == sums
        for (source, row, first), start, end in zip(
            columns["seq_origin"], bounds[:-1], bounds[1:], strict=True
        ):
            assert first == 0
            prompt, answer = SAMPLES[row // 2]
            assert columns["tokens"][start:end].tolist() == [
                row // 2 * 1000 + at for at in range(prompt + answer)
            ]
            assert columns["loss_mask"][start:end].tolist() == [0] * prompt + [1] * answer
            seen.append((int(source), int(row), int(end - start)))
    rows, sizes = sequences["row"].tolist(), sequences["length"].tolist()
    assert Counter(seen) == Counter(zip(source_of.tolist(), rows, sizes, strict=True))
    assert assembled.loss_tokens.tolist() == [int(part["loss_tokens"].sum()) for part in chosen]
    assert assembled.max_token_id == max(
        row // 2 * 1000 + size - 1 for row, size in zip(rows, sizes, strict=True)
    )
