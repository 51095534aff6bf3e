"""A written shard is what numpy reads, and the entry describes the bytes on disk."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import shard_writer
from shared.shard_format import COLUMNS
from shared.shard_writer import write_shard

Columns = dict[str, npt.NDArray[Any]]


def columns_of(lengths: list[list[int]], seed: int) -> Columns:
    """Columns of packs with sequences of these lengths and made-up tokens."""
    rng = np.random.default_rng(seed)
    flat = [length for pack in lengths for length in pack]
    tokens, sequences = sum(flat), len(flat)
    return {
        "tokens": rng.integers(0, 1 << 30, tokens).astype(np.int32),
        "loss_mask": rng.integers(0, 2, tokens).astype(np.uint8),
        "kind": rng.integers(0, 256, tokens).astype(np.uint8),
        "seq_offsets": np.cumsum([0, *flat]),
        "pack_offsets": np.cumsum([0, *map(len, lengths)]),
        "pack_loss_tokens": rng.integers(0, 1 << 30, len(lengths)).astype(np.int32),
        "seq_origin": rng.integers(0, 1 << 40, (sequences, 3)),
    }


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), max_size=5), st.integers(0, 99)
)
@settings(deadline=None)
def test_numpy_reads_what_was_written_and_the_entry_describes_it(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], seed: int
) -> None:
    columns, root = columns_of(lengths, seed), tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "_BLOCK_BYTES", 7)  # several blocks, the last one short
        entry = write_shard(root, 12, columns)
    assert entry.path == "shards/00012"
    assert (entry.packs, entry.sequences) == (len(lengths), sum(map(len, lengths)))
    assert entry.tokens == sum(map(sum, lengths))
    assert entry.loss_tokens == sum(columns["pack_loss_tokens"].tolist())  # beyond 32 bits too
    assert sorted(entry.files) == sorted(f"{name}.npy" for name in COLUMNS)
    for name, file in entry.files.items():
        path = root / entry.path / name
        data = path.read_bytes()
        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        np.testing.assert_array_equal(np.load(path), columns[path.stem])


def test_a_column_that_is_a_view_is_written_in_order(tmp_path: Path) -> None:
    columns = columns_of([[4, 3], [2]], 0)
    columns["tokens"] = np.repeat(columns["tokens"], 2)[::2]
    columns["seq_origin"] = np.asfortranarray(columns["seq_origin"])
    write_shard(tmp_path, 0, columns)
    for name in ("tokens", "seq_origin"):
        np.testing.assert_array_equal(
            np.load(tmp_path / "shards" / "00000" / f"{name}.npy"), columns[name]
        )


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": np.zeros(9, np.int64)},
        {"tokens": np.zeros(9, ">i4")},
        {"seq_origin": np.zeros((3, 2), np.int64)},
        {"extra": np.zeros(1)},
    ],
)
def test_columns_of_another_form_are_a_bug_of_the_caller(change: Columns, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_shard(tmp_path, 0, {**columns_of([[4, 3], [2]], 0), **change})


def test_a_shard_is_not_written_over_another(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, columns_of([[1]], 0))
    with pytest.raises(FileExistsError):
        write_shard(tmp_path, 0, columns_of([[1]], 0))
