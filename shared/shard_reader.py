"""Open a shard set: check that it is whole, map its columns, return packs. The cost does not grow
with its tokens.

`open_shard_set` looks at the manifest, the file sizes, the .npy headers and the ends of the offset
columns only; `check_hashes` reads every byte.
"""

import errno
import json
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shared.errors import ArtifactError, ChecksumError, IncompleteArtifactError
from shared.file_stamp import MappedFileStamp, stamp
from shared.hashing import sha256_file
from shared.shard_format import (
    COLUMNS,
    MANIFEST_NAME,
    TOKENIZER_DIR,
    FileEntry,
    Manifest,
    manifest_from_json,
    npy_header,
)


@dataclass(frozen=True, slots=True)
class Pack:
    """One row of at most max_seq_len tokens; views of the mapped columns, nothing is copied."""

    tokens: npt.NDArray[np.int32]  # [T]
    loss_mask: npt.NDArray[np.uint8]  # [T]
    seq_offsets: npt.NDArray[np.int64]  # [S+1], from 0 to T
    seq_origin: npt.NDArray[np.int64]  # [S, 3]


@dataclass(frozen=True, slots=True)
class ShardSet:
    """A whole shard set. Packs are numbered over all shards, in order."""

    path: Path
    manifest: Manifest
    shards: tuple[dict[str, npt.NDArray[Any]], ...]  # the mapped columns of each shard
    pack_starts: tuple[int, ...]  # number of the first pack of each shard
    seq_starts: tuple[int, ...]  # number of the first sequence of each shard
    # the mapped files of each shard, as they were when they were opened
    stamps: tuple[tuple[MappedFileStamp, ...], ...]

    @property
    def num_packs(self) -> int:
        return self.manifest.totals.packs

    @property
    def num_sequences(self) -> int:
        return self.manifest.totals.sequences

    def pack(self, pack_id: int) -> Pack:
        """Return pack `pack_id`, 0 <= pack_id < num_packs. Raises ChecksumError if its offsets make
        no sense."""
        columns, local = self._locate(pack_id)
        first, last = columns["pack_offsets"][local : local + 2].tolist()
        return self._cut(columns, first, last, f"pack {pack_id}")

    def sequence(self, sequence_id: int) -> Pack:
        """Return sequence `sequence_id`, 0 <= sequence_id < num_sequences, as a pack; errors as for
        packs."""
        columns, local = self._locate_sequence(sequence_id)
        return self._cut(columns, local, local + 1, f"sequence {sequence_id}")

    def pack_of(self, sequence_id: int) -> int:
        """Return the pack that holds sequence `sequence_id`."""
        columns, local = self._locate_sequence(sequence_id)
        shard = bisect_right(self.seq_starts, sequence_id) - 1
        pack = int(np.searchsorted(columns["pack_offsets"], local, side="right")) - 1
        return self.pack_starts[shard] + pack

    def check_unchanged(self, shards: Iterable[int] | None = None) -> None:
        """Raise ArtifactError if a mapped file of `shards` (default: all) is no longer the one that
        was opened.

        Call it before pages are read: a page of a truncated file kills the process. It costs a stat
        per file.
        """
        for shard in range(len(self.shards)) if shards is None else shards:
            for file_stamp in self.stamps[shard]:
                file_stamp.check()

    def shards_of(
        self, unit_ids: npt.NDArray[np.int64], unit: Literal["pack", "conversation"]
    ) -> list[int]:
        """Return the shards that hold these packs, or sequences; reads no column."""
        starts = np.asarray(self.pack_starts if unit == "pack" else self.seq_starts)
        shards: list[int] = np.unique(np.searchsorted(starts, unit_ids, side="right") - 1).tolist()
        return shards

    def kinds(self, pack_id: int) -> npt.NDArray[np.uint8]:
        """Return the kind of every token of a pack, uint8 [T]: for inspection, never for
        training."""
        columns, local = self._locate(pack_id)
        start, end = columns["seq_offsets"][columns["pack_offsets"][local : local + 2]]
        kinds: npt.NDArray[np.uint8] = columns["kind"][start:end]
        return kinds

    def loss_tokens(self, pack_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of loss tokens of each pack of `pack_ids`, int64 [len(pack_ids)]."""
        counts = np.zeros(len(pack_ids), np.int64)
        shard_of = np.searchsorted(np.asarray(self.pack_starts), pack_ids, side="right") - 1
        for shard in np.unique(shard_of):
            in_shard = shard_of == shard
            local = pack_ids[in_shard] - self.pack_starts[shard]
            counts[in_shard] = self.shards[shard]["pack_loss_tokens"][local]
        return counts

    def seq_lengths(self, pack_id: int) -> npt.NDArray[np.int64]:
        """Return the length in tokens of each sequence of a pack, int64 [S]; maps the offsets
        only."""
        columns, local = self._locate(pack_id)
        first, last = columns["pack_offsets"][local : local + 2]
        return np.diff(columns["seq_offsets"][first : last + 1])

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / TOKENIZER_DIR

    def _cut(self, columns: dict[str, npt.NDArray[Any]], first: int, last: int, what: str) -> Pack:
        # the numbers come from mapped bytes that nobody has hashed, so they are checked before they
        # index anything
        offsets = columns["seq_offsets"][max(0, first) : max(0, last + 1)]
        if not (0 <= first < last and len(offsets) == last - first + 1):
            wrong = f"holds sequences {first} to {last} of {len(columns['seq_origin'])}"
        elif (np.diff(offsets) < 1).any() or not 0 <= offsets[0] < offsets[-1] <= len(
            columns["tokens"]
        ):
            wrong = (
                f"runs over offsets {offsets[0]} to {offsets[-1]} that do not rise within the shard"
            )
        elif offsets[-1] - offsets[0] > self.manifest.max_seq_len:
            wrong = (
                f"holds {offsets[-1] - offsets[0]} tokens; expected at most"
                f" {self.manifest.max_seq_len}"
            )
        else:
            start, end = offsets[0], offsets[-1]
            tokens, loss_mask = columns["tokens"][start:end], columns["loss_mask"][start:end]
            return Pack(tokens, loss_mask, offsets - start, columns["seq_origin"][first:last])
        raise ChecksumError(
            f"{self.path}: {what} {wrong}; its bytes have changed, run sft-prep verify on the set"
        )

    def _locate(self, pack_id: int) -> tuple[dict[str, npt.NDArray[Any]], int]:
        if not 0 <= pack_id < self.num_packs:
            raise IndexError(f"pack {pack_id} of {self.num_packs}")
        shard = bisect_right(self.pack_starts, pack_id) - 1
        return self.shards[shard], pack_id - self.pack_starts[shard]

    def _locate_sequence(self, sequence_id: int) -> tuple[dict[str, npt.NDArray[Any]], int]:
        if not 0 <= sequence_id < self.num_sequences:
            raise IndexError(f"sequence {sequence_id} of {self.num_sequences}")
        shard = bisect_right(self.seq_starts, sequence_id) - 1
        return self.shards[shard], sequence_id - self.seq_starts[shard]


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the shard set at `path`.

    Raises IncompleteArtifactError if there is none, FormatVersionError or ArtifactError if it
    cannot be read.
    """
    file = path / MANIFEST_NAME
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError as exc:
        what = "does not exist"
        if path.is_dir():
            what = "is not a whole shard set: it has no manifest.json"
        raise IncompleteArtifactError(f"{path} {what}; make one with sft-prep build") from exc
    except NotADirectoryError as exc:
        raise IncompleteArtifactError(
            f"{path} is a file; expected the directory of a shard set"
        ) from exc
    except OSError as exc:
        raise ArtifactError(f"cannot read {file}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ArtifactError(f"{file} is not valid JSON ({exc}); build the set again") from exc
    return manifest_from_json(data, str(file))


def open_shard_set(path: Path) -> ShardSet:
    """Map the shard set at `path` read-only.

    Raises IncompleteArtifactError for a missing or short file, ChecksumError for a column that is
    not the one the manifest describes, FormatVersionError for another format.
    """
    manifest = read_manifest(path)
    shards, stamps = [], []
    for entry in manifest.shards:
        counts = {"T": entry.tokens, "S": entry.sequences, "P": entry.packs}
        mapped = {
            name: _map_column(path / entry.path, name, entry.files, counts) for name in COLUMNS
        }
        columns = {name: column for name, (column, _) in mapped.items()}
        stamps.append(tuple(file_stamp for _, file_stamp in mapped.values()))
        _check_ends(path / entry.path / "seq_offsets.npy", columns["seq_offsets"], entry.tokens)
        _check_ends(
            path / entry.path / "pack_offsets.npy", columns["pack_offsets"], entry.sequences
        )
        shards.append(columns)
    pack_starts = tuple(accumulate((entry.packs for entry in manifest.shards), initial=0))[:-1]
    seq_starts = tuple(accumulate((entry.sequences for entry in manifest.shards), initial=0))[:-1]
    return ShardSet(path, manifest, tuple(shards), pack_starts, seq_starts, tuple(stamps))


def check_hashes(path: Path) -> None:
    """Read every file that the manifest lists and compare its sha256. Raises ChecksumError,
    IncompleteArtifactError."""
    manifest = read_manifest(path)
    # sizes first, file by file: a truncated file is reported without reading it
    listed = [
        (path / TOKENIZER_DIR / name, entry) for name, entry in manifest.tokenizer.files.items()
    ]
    listed += [
        (path / shard.path / name, entry)
        for shard in manifest.shards
        for name, entry in shard.files.items()
    ]
    for file, entry in listed:
        _check_size(file, entry)
        sha256 = sha256_file(file)
        if sha256 != entry.sha256:
            raise ChecksumError(
                f"{file}: sha256 is {sha256[:16]}..., the manifest says {entry.sha256[:16]}...; "
                "its bytes have changed, build or pull the set again"
            )


def _check_size(file: Path, entry: FileEntry) -> None:
    try:
        size = file.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise IncompleteArtifactError(f"{file} is missing; build or pull the set again") from exc
    if size != entry.bytes:
        raise IncompleteArtifactError(
            f"{file} has {size} bytes, the manifest says {entry.bytes}; build or pull the set again"
        )


def _map_column(
    folder: Path, name: str, files: dict[str, FileEntry], counts: dict[str, int]
) -> tuple[npt.NDArray[Any], MappedFileStamp]:
    file = folder / f"{name}.npy"
    _check_size(file, files[file.name])
    dtype, tail = COLUMNS[name]
    rows = {
        "seq_offsets": counts["S"] + 1,
        "pack_offsets": counts["P"] + 1,
        "pack_loss_tokens": counts["P"],
        "seq_origin": counts["S"],
    }.get(name, counts["T"])
    # the header is compared, not parsed: the format allows one spelling, and nothing that a
    # stranger wrote there is interpreted
    expected = npy_header(dtype, (rows, *tail))
    size = len(expected) + rows * math.prod(tail) * np.dtype(dtype).itemsize
    try:
        with file.open("rb") as opened:
            header = opened.read(len(expected))
            file_stamp = stamp(file, opened)
        if header != expected or files[file.name].bytes != size:
            raise ChecksumError(
                f"{file} begins with {_header_text(header)} in {files[file.name].bytes} bytes; "
                f"expected {_header_text(expected)} in {size}; build or pull the set again"
            )
        if not rows:  # there is nothing to map
            return np.empty((0, *tail), dtype), file_stamp
        column = np.asarray(
            np.memmap(file, dtype, mode="r", offset=len(expected), shape=(rows, *tail))
        )
        return column, file_stamp
    except OSError as exc:
        advice = (
            "; each shard keeps 7 files open, raise `ulimit -n`"
            if exc.errno == errno.EMFILE
            else ""
        )
        raise ArtifactError(f"cannot read {file}: {exc.strerror}{advice}") from exc


def _header_text(header: bytes) -> str:
    return repr(header[10:].decode("ascii", errors="replace").strip())


def _check_ends(file: Path, offsets: npt.NDArray[np.int64], end: int) -> None:
    if offsets[0] != 0 or offsets[-1] != end:
        raise ChecksumError(
            f"{file} runs from {offsets[0]} to {offsets[-1]}; expected 0 to {end}; build the set"
            " again"
        )
