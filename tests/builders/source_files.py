"""Files of the same rows in every format that a source may have, and what is read from them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from prep.config import SourceConfig
from prep.sources.chunk import parse_chunk
from prep.sources.reader import iter_chunks
from prep.sources.resolve import ResolvedSource, resolve_source
from shared.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"id": f"r{number}", "messages": [{"role": "user", "content": f"Hi \u2028 \x85 {number}"}]}
    for number in range(30)
]


LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)


def resolve(path: str, base: Path, **keys: Any) -> ResolvedSource:
    return resolve_source(SourceConfig(path=path, **keys), base, {})


def parsed(source: ResolvedSource) -> list[tuple[int, str, dict[str, Any] | DataError]]:
    return [row for chunk in iter_chunks(source, source_index=0) for row in parse_chunk(chunk)]


def records(path: str, base: Path) -> list[dict[str, Any] | DataError]:
    return [record for _, _, record in parsed(resolve(path, base))]


def write_hub_directory(root: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    (root / "data").mkdir(parents=True)
    half = len(rows) // 2
    pq.write_table(
        pa.Table.from_pylist(rows[:half]), root / "data" / "train-00000-of-00002.parquet"
    )
    pq.write_table(
        pa.Table.from_pylist(rows[half:]), root / "data" / "train-00001-of-00002.parquet"
    )
    pq.write_table(pa.Table.from_pylist(rows[:1]), root / "data" / "test-00000-of-00001.parquet")
    splits = "".join(
        f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "test")
    )
    (root / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n# Chats\n"
    )
    return root


def write_as(name: str, folder: Path) -> None:
    array = json.dumps(ROWS, indent=1).encode()
    path = folder / name
    if name == "hub":
        write_hub_directory(path)
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        content = array if ".json." in f"{name}." else LINES
        packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(content)
        path.write_bytes(packed)
