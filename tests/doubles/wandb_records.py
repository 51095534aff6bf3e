"""The records that Weights & Biases writes offline: `.wandb` files are logs of protobuf records in
LevelDB's format.

After a header of seven bytes come chunks within blocks of 32 KiB, each with checksum, length and
kind (1 whole, 2 first, 3 middle, 4 last).
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 1 << 15, 7


def histories(folder: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (run id, logged rows) of every run directory below `folder`, in order of time."""
    runs = []
    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        run_id, rows = "", []
        for record in _records(file):
            if record.WhichOneof("record_type") == "run":
                run_id = record.run.run_id
            elif record.WhichOneof("record_type") == "history":
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append(row)
        runs.append((run_id, rows))
    return runs


def _records(file: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:
            # The rest of the block is too small for a header.
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _HEADER
        parts += data[at : at + length]
        at += length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
