"""Write the columns of one shard as .npy files; return their sizes and hashes, for the manifest."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.shard_format import COLUMNS, SHARDS_DIR, FileEntry, ShardEntry, npy_header

_BLOCK_BYTES = 1 << 24


def write_shard(root: Path, index: int, columns: Mapping[str, npt.NDArray[Any]]) -> ShardEntry:
    """Write shard `index` below `root`, a staged directory that the caller renames when the set is
    whole.

    `columns` has exactly the names of COLUMNS, each with that dtype and shape. Raises OSError when
    the disk is full.
    """
    assert set(columns) == set(COLUMNS), sorted(columns)
    path = f"{SHARDS_DIR}/{index:05d}"
    folder = root / path
    folder.mkdir(parents=True)
    files = {}
    for name, (dtype, tail) in COLUMNS.items():
        array = columns[name]
        assert array.dtype == np.dtype(dtype), (name, array.dtype)
        assert array.shape[1:] == tail, (name, array.shape)
        header = npy_header(dtype, array.shape)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        # hashed while it is written, so that nothing is read back
        sha256 = hashlib.sha256(header)
        with (folder / f"{name}.npy").open("xb") as file:
            file.write(header)
            for start in range(0, len(data), _BLOCK_BYTES):
                block = data[start : start + _BLOCK_BYTES].data
                file.write(block)
                sha256.update(block)
        files[f"{name}.npy"] = FileEntry(bytes=len(header) + len(data), sha256=sha256.hexdigest())
    return ShardEntry(
        path=path,
        packs=len(columns["pack_offsets"]) - 1,
        sequences=len(columns["seq_offsets"]) - 1,
        tokens=len(columns["tokens"]),
        loss_tokens=int(columns["pack_loss_tokens"].sum(dtype=np.int64)),
        files=files,
    )
