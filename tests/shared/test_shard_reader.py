"""Write and read columns: a round trip for any packs, and a reader that refuses what is not exactly
the set."""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_sets import random_packs, write_shard_set

from shared import atomic, config
from shared.errors import ArtifactError, ChecksumError, IncompleteArtifactError
from shared.hashing import digest
from shared.shard_format import (
    COLUMNS,
    MANIFEST_NAME,
    FileEntry,
    ShardEntry,
    fingerprint_of_manifest,
    manifest_from_json,
    npy_header,
)
from shared.shard_reader import check_hashes, open_shard_set, read_manifest
from shared.shard_writer import write_shard

SEQUENCE = st.integers(1, 12).flatmap(
    lambda length: st.tuples(
        st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length),
        st.lists(st.integers(0, 1), min_size=length, max_size=length).map(
            lambda mask: [0, *mask[1:]]
        ),
    )
)
PACKS = st.lists(st.lists(SEQUENCE, min_size=1, max_size=4), min_size=1, max_size=9)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    packs = random_packs(num_packs=5, max_seq_len=32, vocab_size=50)
    return write_shard_set(
        tmp_path / "set", packs, max_seq_len=32, vocab_size=50, packs_per_shard=2
    )


# --- round trip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(packs=PACKS, packs_per_shard=st.integers(1, 4))
def test_every_pack_reads_back_as_it_was_written(
    packs: list[list[tuple[list[int], list[int]]]], packs_per_shard: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set"
        write_shard_set(
            path,
            packs,
            max_seq_len=48,
            vocab_size=2**31,
            packs_per_shard=packs_per_shard,
            tokenizer_files={
                "tokenizer.json": b"{}"
            },  # not one with a word per id: that is all of memory
        )
        shards = open_shard_set(path)
        check_hashes(path)
        assert shards.num_packs == len(packs)
        row = 0
        for pack_id, sequences in enumerate(packs):
            pack = shards.pack(pack_id)
            bounds = pack.seq_offsets
            assert [pack.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)] == [
                tokens for tokens, _ in sequences
            ]
            assert pack.loss_mask.tolist() == [bit for _, mask in sequences for bit in mask]
            assert pack.seq_origin.tolist() == [
                [0, row + number, 0] for number in range(len(sequences))
            ]
            assert shards.seq_lengths(pack_id).tolist() == [len(tokens) for tokens, _ in sequences]
            assert shards.kinds(pack_id).tolist() == [
                3 if bit else 2 for bit in pack.loss_mask.tolist()
            ]
            row += len(sequences)
        expected = [sum(sum(mask) for _, mask in sequences) for sequences in packs]
        order = np.arange(len(packs))[::-1].copy()
        assert shards.loss_tokens(order).tolist() == expected[::-1]


def test_the_columns_are_plain_read_only_arrays_of_the_specified_types(small: Path) -> None:
    pack = open_shard_set(small).pack(0)
    assert {
        type(column) for column in (pack.tokens, pack.loss_mask, pack.seq_offsets, pack.seq_origin)
    } == {np.ndarray}
    assert [pack.tokens.dtype, pack.loss_mask.dtype, pack.seq_offsets.dtype] == [
        np.int32,
        np.uint8,
        np.int64,
    ]
    with pytest.raises(ValueError, match="read-only"):
        pack.tokens[0] = 1


def test_numpy_alone_reads_every_column(small: Path) -> None:
    for name, (dtype, tail) in COLUMNS.items():
        array = np.load(small / "shards/00000" / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        assert (array.dtype.str, array.shape[1:]) == (dtype, tail)


def test_the_bytes_are_those_of_numpy(small: Path, tmp_path: Path) -> None:
    for name in COLUMNS:
        file = small / "shards/00001" / f"{name}.npy"
        np.save(tmp_path / "again.npy", np.load(file))
        assert (tmp_path / "again.npy").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("pack_id", [-1, 5])
def test_a_pack_that_does_not_exist_is_an_index_error(small: Path, pack_id: int) -> None:
    with pytest.raises(IndexError, match=f"pack {pack_id} of 5"):
        open_shard_set(small).pack(pack_id)


def empty_columns() -> dict[str, Any]:
    return {
        name: np.zeros((1 if name.endswith("_offsets") else 0, *tail), dtype)
        for name, (dtype, tail) in COLUMNS.items()
    }


def rewrite_manifest(path: Path, shards: list[ShardEntry]) -> None:
    data = json.loads((path / MANIFEST_NAME).read_bytes())
    data["shards"] = [config.to_plain(shard) for shard in shards]
    for count in ("packs", "sequences", "tokens", "loss_tokens"):
        data["totals"][count] = sum(getattr(shard, count) for shard in shards)
    del data["seal"]
    loose = config.build(type(read_manifest(path)), data, "test")
    data["fingerprint"] = fingerprint_of_manifest(loose)
    data["seal"] = digest(data)
    manifest_from_json(data, "test")
    atomic.write_json(path / MANIFEST_NAME, data)


def test_a_set_without_shards_opens(small: Path) -> None:
    rewrite_manifest(small, [])
    shards = open_shard_set(small)
    assert shards.num_packs == 0
    assert shards.loss_tokens(np.zeros(0, np.int64)).tolist() == []


def test_shards_without_packs_open_and_are_passed_over(small: Path) -> None:
    full = read_manifest(small).shards[0]
    os.rename(small / "shards/00000", small / "full")
    for name in ("00001", "00002"):
        os.rename(small / "shards" / name, small / name)
    empty = [write_shard(small, index, empty_columns()) for index in (0, 2)]
    os.rename(small / "full", small / "shards/00001")
    moved = ShardEntry(
        **{**{name: getattr(full, name) for name in ShardEntry.__slots__}, "path": "shards/00001"}
    )
    rewrite_manifest(small, [empty[0], moved, empty[1]])
    shards = open_shard_set(small)
    check_hashes(small)
    assert shards.num_packs == 2
    assert all(len(shards.pack(pack_id).tokens) for pack_id in range(2))
    assert (
        shards.loss_tokens(np.arange(2)) == [shards.pack(p).loss_mask.sum() for p in range(2)]
    ).all()


# --- what the reader refuses


def test_a_directory_without_a_manifest_is_not_whole(small: Path) -> None:
    (small / MANIFEST_NAME).unlink()
    with pytest.raises(
        IncompleteArtifactError, match="is not a whole shard set: it has no manifest"
    ):
        open_shard_set(small)


def test_an_absent_directory_and_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(IncompleteArtifactError, match="nowhere does not exist"):
        open_shard_set(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        IncompleteArtifactError, match="file is a file; expected the directory of a shard set"
    ):
        open_shard_set(tmp_path / "file")


def test_a_torn_manifest_is_refused(small: Path) -> None:
    whole = (small / MANIFEST_NAME).read_bytes()
    for length in range(0, len(whole) - 1, 97):
        (small / MANIFEST_NAME).write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="is not valid JSON"):
            open_shard_set(small)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_refused(small: Path, name: str) -> None:
    (small / "shards/00001" / f"{name}.npy").unlink()
    with pytest.raises(IncompleteArtifactError, match=rf"shards/00001/{name}\.npy is missing"):
        open_shard_set(small)


@pytest.mark.parametrize("change", [-1, 1, -(10**9)])
@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_another_size_is_refused(small: Path, name: str, change: int) -> None:
    file = small / "shards/00000" / f"{name}.npy"
    os.truncate(file, max(0, file.stat().st_size + change))
    with pytest.raises(
        IncompleteArtifactError, match=rf"{name}\.npy has \d+ bytes, the manifest says \d+"
    ):
        open_shard_set(small)


def overwrite(file: Path, data: bytes) -> None:
    """Put `data` at the start of a file, whose size stays."""
    with file.open("r+b") as opened:
        opened.write(data)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("tokens", ">i4", "(T,)"),
        ("tokens", "<u4", "(T,)"),
        ("tokens", "<f4", "(T,)"),
        ("tokens", "<i4", "(T, 1)"),
        ("loss_mask", "|b1", "(T,)"),
        ("loss_mask", "|i1", "(T,)"),
        ("seq_origin", "<i8", "(3, S)"),
        ("seq_origin", "<i8", "(3S,)"),
        ("pack_loss_tokens", "<i4", "(P - 1,)"),
    ],
)
def test_a_column_with_another_header_is_refused(
    small: Path, name: str, dtype: str, shape: str
) -> None:
    entry = read_manifest(small).shards[0]
    counts = {"T": entry.tokens, "S": entry.sequences, "P": entry.packs, "3S": 3 * entry.sequences}
    sizes = {"P - 1": entry.packs - 1, "1": 1, "3": 3, **counts}
    file = small / "shards/00000" / f"{name}.npy"
    overwrite(
        file,
        npy_header(
            dtype, tuple(sizes[size.strip()] for size in shape.strip("()").split(",") if size)
        ),
    )
    with pytest.raises(ChecksumError, match=rf"{name}\.npy begins with .*; expected"):
        open_shard_set(small)


def test_a_column_in_fortran_order_is_refused(small: Path) -> None:
    file = small / "shards/00000/seq_origin.npy"
    data = np.load(file)
    with file.open("wb") as opened:
        np.save(opened, np.asfortranarray(data))
    with pytest.raises(ChecksumError, match=r"begins with .*'fortran_order': True"):
        open_shard_set(small)


@pytest.mark.parametrize(
    "start", [b"\x80\x04", b"PK\x03\x04", b"\x93NUMPY\x09\x00", b"\x93NUMPY\x01\x00\xff\xff"]
)
def test_a_file_that_is_not_npy_is_refused(small: Path, start: bytes) -> None:
    overwrite(small / "shards/00000/tokens.npy", start)
    with pytest.raises(ChecksumError, match=r"tokens\.npy begins with"):
        open_shard_set(small)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(small: Path) -> None:
    overwrite(small / "shards/00000/tokens.npy", npy_header("<i4", (10**12,)))
    with pytest.raises(ChecksumError):
        open_shard_set(small)


def test_an_empty_file_that_the_manifest_asks_for_is_refused(small: Path) -> None:
    (small / "shards/00000/kind.npy").write_bytes(b"")
    first, *others = read_manifest(small).shards
    first.files["kind.npy"] = FileEntry(bytes=0, sha256="0" * 64)
    rewrite_manifest(small, [first, *others])
    with pytest.raises(ChecksumError, match=r"kind\.npy begins with '' in 0 bytes"):
        open_shard_set(small)


def test_a_column_with_more_data_than_its_header_says_is_refused(small: Path) -> None:
    file = small / "shards/00000/kind.npy"
    with file.open("ab") as opened:
        opened.write(b"more")
    first, *others = read_manifest(small).shards
    first.files["kind.npy"] = FileEntry(bytes=file.stat().st_size, sha256="0" * 64)
    rewrite_manifest(small, [first, *others])
    with pytest.raises(ChecksumError, match=r"kind\.npy begins with .* in \d+ bytes; expected"):
        open_shard_set(small)


@pytest.mark.parametrize("name", ["seq_offsets", "pack_offsets"])
@pytest.mark.parametrize("at", [128, -8])
def test_offsets_that_do_not_span_the_shard_are_refused(small: Path, name: str, at: int) -> None:
    file = small / "shards/00000" / f"{name}.npy"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumError, match=rf"{name}\.npy runs from \d+ to \d+; expected 0 to"):
        open_shard_set(small)


@pytest.mark.parametrize(
    "file", [f"shards/00002/{name}.npy" for name in COLUMNS] + ["tokenizer/tokenizer.json"]
)
def test_a_flipped_bit_is_found_by_the_hashes(small: Path, file: str) -> None:
    data = bytearray((small / file).read_bytes())
    data[-1] ^= 0x40
    (small / file).write_bytes(data)
    with pytest.raises(ChecksumError, match=f"{re.escape(file)}: sha256 is "):
        check_hashes(small)


def test_hashes_of_an_untouched_set_agree(small: Path) -> None:
    check_hashes(small)


def test_a_missing_tokenizer_file_is_found_by_the_hashes(small: Path) -> None:
    (small / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(IncompleteArtifactError, match=r"tokenizer\.json is missing"):
        check_hashes(small)


# --- size

GROWTH = """
import resource, sys
from pathlib import Path
import numpy as np
from shared.shard_reader import open_shard_set

def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])

open_shard_set(Path(sys.argv[1]))
before = resident()
shards = open_shard_set(Path(sys.argv[2]))
shards.loss_tokens(np.array([0, shards.num_packs - 1]))
print(resident() - before)
"""


def write_sparse_set(path: Path, example: Path, tokens: int, rows: int) -> None:
    """Write a set with `rows` packs of one sequence each, all zeros but the ends of the offsets:
    holes on disk."""
    rows_of = {
        "seq_offsets": rows + 1,
        "pack_offsets": rows + 1,
        "pack_loss_tokens": rows,
        "seq_origin": rows,
    }
    folder = path / "shards/00000"
    folder.mkdir(parents=True)
    files = {}
    for name, (dtype, tail) in COLUMNS.items():
        shape = (rows_of.get(name, tokens), *tail)
        file = folder / f"{name}.npy"
        size = 128 + int(np.prod(shape)) * np.dtype(dtype).itemsize
        file.write_bytes(npy_header(dtype, shape))
        os.truncate(file, size)
        files[file.name] = FileEntry(bytes=size, sha256="0" * 64)
    for name, end in (("seq_offsets", tokens), ("pack_offsets", rows)):
        with (folder / f"{name}.npy").open("r+b") as opened:
            opened.seek(-8, os.SEEK_END)
            opened.write(end.to_bytes(8, "little"))
    (path / MANIFEST_NAME).write_bytes((example / MANIFEST_NAME).read_bytes())
    rewrite_manifest(
        path,
        [
            ShardEntry(
                path="shards/00000",
                packs=rows,
                sequences=rows,
                tokens=tokens,
                loss_tokens=0,
                files=files,
            )
        ],
    )


def test_opening_ten_gigabytes_takes_no_more_memory_than_opening_a_small_set(
    small: Path, tmp_path: Path
) -> None:
    write_sparse_set(tmp_path / "huge", small, tokens=1_700_000_000, rows=1_000_000)
    sizes = [file.stat() for file in (tmp_path / "huge").rglob("*") if file.is_file()]
    assert sum(size.st_size for size in sizes) > 10e9
    assert sum(size.st_blocks * 512 for size in sizes) < 1e6
    command = [sys.executable, "-c", GROWTH, str(small), str(tmp_path / "huge")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2048  # KiB; a mapped page that is touched counts too


def test_a_low_limit_on_open_files_is_named(small: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from shared.shard_reader import"
        " open_shard_set\nresource.setrlimit(resource.RLIMIT_NOFILE, (16,"
        " 16))\nopen_shard_set(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(small)], capture_output=True, text=True)
    assert "ArtifactError: cannot read" in done.stderr
    assert "raise `ulimit -n`" in done.stderr
