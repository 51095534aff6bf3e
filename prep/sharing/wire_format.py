"""The files that travel when a set is pushed or pulled, and transfer.json, which lists each column
before and after compression.

    shards/00000/tokens.npy  --zstd-->  shards/00000/tokens.npy.zst      likewise below eval/
    manifest.json, tokenizer/*          as they are
    transfer.json              sha256 and size of each column, before and after; of each manifest

Files that are no part of the content (build_info.json, rejects.jsonl.zst) never travel: they hold
local paths and rejected rows.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from shared import config
from shared.errors import ArtifactError, ChecksumError, ConfigError
from shared.hashing import sha256_bytes, sha256_file
from shared.shard_format import (
    EVAL_DIR,
    MANIFEST_NAME,
    TOKENIZER_DIR,
    FileEntry,
    Manifest,
    manifest_from_json,
)
from shared.shard_reader import read_manifest

TRANSFER_NAME = "transfer.json"
TRANSFER_VERSION = 1
SUFFIX = ".zst"
EVAL_MANIFEST = f"{EVAL_DIR}/{MANIFEST_NAME}"

# on real tokens, one core: level 1 2.8x at 270 MB/s, 3 3.6x at 150, 6 4.0x at 50, 9 4.1x at 30
_LEVEL = 3
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class SetEntry:
    """One manifest and the set that it describes."""

    bytes: int
    sha256: str
    fingerprint: str

    @property
    def file(self) -> FileEntry:
        return FileEntry(bytes=self.bytes, sha256=self.sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnEntry:
    """One column: its bytes in the set, and those of its compressed file."""

    bytes: int
    sha256: str
    zstd: FileEntry

    @property
    def raw(self) -> FileEntry:
        return FileEntry(bytes=self.bytes, sha256=self.sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferIndex:
    """The contents of transfer.json. While a push is unfinished it lists the columns that have
    arrived."""

    transfer_version: int
    sets: dict[str, SetEntry]
    """Path of a manifest -> that manifest: the set's own and, where there is one, that of its eval
    set."""
    columns: dict[str, ColumnEntry]
    """Path of a column in the set -> that column."""


@dataclass(frozen=True, slots=True)
class SetContents:
    """The files of a set and of its eval set, by their paths in it."""

    manifest: Manifest
    sets: dict[str, SetEntry]
    columns: dict[str, FileEntry]
    tokenizers: dict[str, FileEntry]


def contents_of(manifests: dict[str, bytes], where: str) -> SetContents:
    """Return the files that the manifests (path -> bytes) list. Raises ArtifactError if one cannot
    be used."""
    sets, columns, tokenizers, parsed = {}, {}, {}, {}
    for path, data in manifests.items():
        name = f"{where}: {path}"
        plain = _parse_json(data, name, "build or push the set again")
        parsed[path] = manifest = manifest_from_json(plain, name)
        folder = path.removesuffix(MANIFEST_NAME)
        sets[path] = SetEntry(
            bytes=len(data), sha256=sha256_bytes(data), fingerprint=manifest.fingerprint
        )
        for shard in manifest.shards:
            for name, entry in sorted(shard.files.items()):
                columns[f"{folder}{shard.path}/{name}"] = entry
        for name, entry in sorted(manifest.tokenizer.files.items()):
            tokenizers[f"{folder}{TOKENIZER_DIR}/{name}"] = entry
    return SetContents(parsed[MANIFEST_NAME], sets, columns, tokenizers)


def contents_of_set(path: Path) -> SetContents:
    """Return the files of the set at `path`, its eval set included; only the manifests are read."""
    read_manifest(path)  # its errors explain a directory without a manifest
    manifests = {MANIFEST_NAME: (path / MANIFEST_NAME).read_bytes()}
    if (path / EVAL_DIR).exists():
        read_manifest(path / EVAL_DIR)
        manifests[EVAL_MANIFEST] = (path / EVAL_MANIFEST).read_bytes()
    return contents_of(manifests, str(path))


def transfer_from_json(data: bytes, where: str) -> TransferIndex:
    """Return the index in `data`. Raises ArtifactError if it is damaged or of another version."""
    advice = "push the set again with --replace"
    tables = _parse_json(data, where, advice)
    version = tables.get("transfer_version") if isinstance(tables, dict) else None
    if version != TRANSFER_VERSION:
        raise ArtifactError(
            f"{where}: transfer_version is {version!r}, this program reads {TRANSFER_VERSION};"
            f" {advice}"
        )
    try:
        transfer = config.build(TransferIndex, tables, where)
    except ConfigError as exc:
        raise ArtifactError(f"{exc}; {advice}") from exc
    if not {MANIFEST_NAME} <= set(transfer.sets) <= {MANIFEST_NAME, EVAL_MANIFEST}:
        raise ArtifactError(f"{where} names the manifests {sorted(transfer.sets)}; {advice}")
    return transfer


def fingerprints(sets: dict[str, SetEntry]) -> str:
    """Return the identity of a set for people: its fingerprint and its eval set's."""
    own = sets[MANIFEST_NAME].fingerprint
    return f"{own} with eval {sets[EVAL_MANIFEST].fingerprint}" if EVAL_MANIFEST in sets else own


def compress(source: Path, target: Path, expected: FileEntry) -> FileEntry:
    """Write the column `source` to `target` as one zstd frame; one release of zstd always gives the
    same bytes.

    Raises ChecksumError if its bytes are not `expected`: they changed since they were verified.
    """
    changed = f"{source} changed while it was pushed; verify the set, then push again"
    if source.stat().st_size != expected.bytes:
        raise ChecksumError(changed)
    # no dictionary and no threads: both would make the bytes depend on more than the column
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    state = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            source.open("rb") as opened,
            target.open("wb") as sink,
            compressor.stream_writer(sink, size=expected.bytes) as writer,
        ):
            while block := opened.read(_BLOCK_BYTES):
                state.update(block)
                writer.write(block)
    except zstandard.ZstdError as exc:  # more or fewer bytes than the file had a moment ago
        raise ChecksumError(changed) from exc
    if state.hexdigest() != expected.sha256:
        raise ChecksumError(changed)
    return FileEntry(bytes=target.stat().st_size, sha256=sha256_file(target))


def decompress(stored: Path, target: Path, entry: ColumnEntry, *, where: str) -> None:
    """Write the column in the frame `stored` to `target`, whole and equal to `entry`, or not at
    all.

    Raises ChecksumError. Never writes more than `entry.bytes`: the frame may come from a stranger.
    """
    check_file(stored, entry.zstd, where=where)
    state, size = hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        with (
            stored.open("rb") as opened,
            part.open("wb") as sink,
            zstandard.ZstdDecompressor().stream_reader(opened) as reader,
        ):
            # one byte more than announced is enough to know that a frame swells too far
            while size <= entry.bytes and (
                block := reader.read(min(_BLOCK_BYTES, entry.bytes + 1 - size))
            ):
                state.update(block)
                size += len(block)
                sink.write(block)
    except zstandard.ZstdError as exc:
        part.unlink()
        raise ChecksumError(
            f"{where} is no zstd frame ({exc}); push the set again with --replace"
        ) from exc
    if size != entry.bytes or state.hexdigest() != entry.sha256:
        part.unlink()
        raise ChecksumError(
            f"{where} holds {size} bytes or more with sha256 {state.hexdigest()[:16]}..., the"
            f" manifest says {entry.bytes} with {entry.sha256[:16]}...; push the set again with"
            " --replace"
        )
    part.rename(target)


def check_file(path: Path, expected: FileEntry, *, where: str) -> None:
    """Raise ChecksumError unless the file at `path` is `expected`; `where` is its remote name."""
    size = path.stat().st_size
    seen, wanted = f"{size} bytes", str(expected.bytes)
    if size == expected.bytes:
        sha256 = sha256_file(path)
        if sha256 == expected.sha256:
            return
        seen, wanted = f"sha256 {sha256[:16]}...", f"{expected.sha256[:16]}..."
    raise ChecksumError(
        f"{where} arrived with {seen}, expected {wanted}; pull again, and if it is the same, "
        "the stored copy is damaged: push the set again"
    )


def matches(path: Path, expected: FileEntry) -> bool:
    """Return whether there is a file at `path` and it is `expected`."""
    return (
        path.is_file()
        and path.stat().st_size == expected.bytes
        and sha256_file(path) == expected.sha256
    )


def _parse_json(data: bytes, where: str, advice: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as exc:
        raise ArtifactError(f"{where} is not valid JSON ({exc}); {advice}") from exc
