"""Write the columns of one shard as .npy files and say what was written: sizes and hashes, for the manifest."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from shared.shard_format import COLUMNS, SHARDS_DIR, FileEntry, ShardEntry

_BLOCK_BYTES = 1 << 24


def write_shard(root: Path, index: int, columns: Mapping[str, npt.NDArray[Any]]) -> ShardEntry:
    """Write shard `index` below `root` (a staged directory: the caller renames it when the set is whole).

    `columns` has exactly the names of COLUMNS, each with that dtype and shape. Raises OSError when the disk is full.
    """
    path = f"{SHARDS_DIR}/{index:05d}"
    folder = root / path
    folder.mkdir(parents=True)
    files = {f"{name}.npy": _write_column(folder / f"{name}.npy", columns[name], *COLUMNS[name]) for name in COLUMNS}
    return ShardEntry(
        path=path,
        packs=len(columns["pack_offsets"]) - 1,
        sequences=len(columns["seq_offsets"]) - 1,
        tokens=len(columns["tokens"]),
        loss_tokens=int(columns["pack_loss_tokens"].sum(dtype=np.int64)),
        files=files,
    )


def _write_column(path: Path, array: npt.NDArray[Any], dtype: str, tail: tuple[int, ...]) -> FileEntry:
    assert array.dtype == np.dtype(dtype), (path.name, array.dtype)
    assert array.shape[1:] == tail, (path.name, array.shape)
    contiguous = np.ascontiguousarray(array)
    with path.open("xb") as file:
        hashing = _HashingFile(file)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(contiguous))
        hashing.write(header.getvalue())
        data = memoryview(contiguous.reshape(-1)).cast("B") if contiguous.size else memoryview(b"")
        for start in range(0, len(data), _BLOCK_BYTES):
            hashing.write(data[start : start + _BLOCK_BYTES])
    return FileEntry(bytes=hashing.bytes_written, sha256=hashing.sha256.hexdigest())


class _HashingFile:
    """A file being written, with the hash of what went in, so that nothing is read back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes_written = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.bytes_written += len(data)
