"""transfer.json has the digests of both ends; compression is the same every time and swells no
further."""

import json
import os
from pathlib import Path

import pytest
import zstandard
from hub_state import Hub
from pushed_sets import (
    REPO,
    done,
)

from prep.sharing.wire_format import ColumnEntry, compress, decompress
from shared.errors import ChecksumError
from shared.hashing import canonical_json, sha256_bytes
from shared.shard_format import FileEntry


def test_transfer_json_has_the_digests_of_both_ends(hub: Hub, shards: Path) -> None:
    done("push", shards, REPO)
    files = {path: blob.data for path, blob in hub.repositories[REPO].files().items()}
    transfer = json.loads(files["transfer.json"])
    assert canonical_json(transfer) == files["transfer.json"]
    assert {path + ".zst" for path in transfer["columns"]} == {
        path for path in files if path.endswith(".zst")
    }
    for path, entry in transfer["columns"].items():
        raw, stored = (shards / path).read_bytes(), files[path + ".zst"]
        assert (entry["bytes"], entry["sha256"]) == (len(raw), sha256_bytes(raw))
        assert entry["zstd"] == {"bytes": len(stored), "sha256": sha256_bytes(stored)}
        assert zstandard.decompress(stored) == raw


def test_compression_is_the_same_every_time_and_refuses_a_changed_file(tmp_path: Path) -> None:
    data = os.urandom(1000) * 5000
    (tmp_path / "column").write_bytes(data)
    expected = FileEntry(bytes=len(data), sha256=sha256_bytes(data))
    first = compress(tmp_path / "column", tmp_path / "one", expected)
    assert compress(tmp_path / "column", tmp_path / "two", expected) == first
    assert first == FileEntry(
        bytes=(tmp_path / "one").stat().st_size,
        sha256=sha256_bytes((tmp_path / "one").read_bytes()),
    )
    for changed in (data[:-1], data[:-1] + b"?"):
        (tmp_path / "column").write_bytes(changed)
        with pytest.raises(ChecksumError, match="changed while it was pushed"):
            compress(tmp_path / "column", tmp_path / "three", expected)


def test_a_frame_that_swells_is_stopped_at_the_announced_size(tmp_path: Path) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    (tmp_path / "bomb").write_bytes(bomb)
    stored = FileEntry(bytes=len(bomb), sha256=sha256_bytes(bomb))
    entry = ColumnEntry(bytes=10, sha256=sha256_bytes(bytes(10)), zstd=stored)
    with pytest.raises(ChecksumError, match="holds 11 bytes or more"):
        decompress(tmp_path / "bomb", tmp_path / "column", entry, where="here")
    assert [path.name for path in tmp_path.iterdir()] == ["bomb"]
