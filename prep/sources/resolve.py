"""Resolve a source of the mixture: find its files, and what identifies their content.

The identity never contains a path or a time: the same bytes elsewhere are the same source. File
hashes are remembered by path, size, times and inode, so that a second build need not read a
terabyte to learn that nothing changed.
"""

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prep.config import SourceConfig
from prep.sources import hub_dataset
from shared.errors import DataError
from shared.hashing import digest, sha256_file

Format = Literal["jsonl", "json", "parquet", "datasets"]
Compression = Literal["", "gz", "zst"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_GLOB = re.compile(r"[*?\[]")


class SourceStamp(NamedTuple):
    """The facts about a file that change when somebody writes to it."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "SourceStamp":
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def same_content(self, other: "SourceStamp") -> bool:
        """Say whether nobody wrote in between. A new name or mode only moves the change time."""
        return (self.size, self.mtime_ns, self.inode) == (other.size, other.mtime_ns, other.inode)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    path: Path
    name: str
    """The path below the directory that all files of the source share, for messages."""
    format: Format
    compression: Compression
    stamp: SourceStamp
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedSource:
    name: str
    files: tuple[SourceFile, ...]
    """In the order of their rows; empty for a hub data set."""
    content_sha256: str | None
    """Of the files' formats, sizes and hashes, in order; None for a hub data set, which has a
    commit."""
    hub_id: str | None
    revision: str | None
    """The resolved commit of a hub data set."""
    requested_revision: str
    directory: Path | None
    """Set for a directory laid out like a hub data set."""
    split: str
    group_of: str = ""
    """The name of the whole source, if this is one of its groups."""

    def identity(self) -> dict[str, str]:
        """Return what determines the rows, the same on every machine."""
        if self.content_sha256 is not None:
            return {"content_sha256": self.content_sha256}
        return {"hub_id": str(self.hub_id), "revision": str(self.revision), "split": self.split}


def resolve_source(source: SourceConfig, base: Path, known: Mapping[str, Any]) -> ResolvedSource:
    """Return the files or the hub commit behind `source`; a relative path is below `base`.

    `known` is what `remember` returned for an earlier build: an unchanged file is not hashed again,
    and a branch of the hub stays at the commit it had. An empty mapping forgets both. Raises
    DataError.
    """
    path = Path(os.path.normpath(base / Path(source.path).expanduser()))
    if path.is_dir():
        paths = hub_dataset.files_of_directory(path, source.split)
        files = _resolve_files(paths, path, known, fixed_format="datasets")
        return _local(source, path.name, files, directory=path)
    if path.is_file():
        return _local(source, _stem(path.name), _resolve_files([path], path.parent, known))
    if _GLOB.search(source.path):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (absolute)
        paths = sorted(filter(Path.is_file, map(Path, matches)), key=os.fsencode)
        if not paths:
            raise DataError(f"no file matches {source.path!r} below {base}; check the glob")
        root = Path(os.path.commonpath([path.parent for path in paths]))
        # named after the words of the last component, or its directory: conversations/*.jsonl.gz
        *folders, last = Path(source.path).parts
        words = re.sub(r"\[[^]]*\]|[*?]+", "-", _stem(last)).strip("-_.")
        plain = [n for n in folders if not _GLOB.search(n) and n not in ("/", ".", "..")]
        name = words or (plain[-1] if plain else "rows")
        return _local(source, name, _resolve_files(paths, root, known))
    if not _HUB_ID.fullmatch(source.path) or _format_of(source.path)[0]:
        raise DataError(
            f"no file {source.path!r} below {base}; give a file, a glob, a directory or the id of a"
            " hub data set"
        )
    revision = known.get(_hub_key(source.path, source.revision))
    if not isinstance(revision, str):
        revision = hub_dataset.resolve_commit(source.path, source.revision)
    return ResolvedSource(
        name=source.name or source.path,
        files=(),
        content_sha256=None,
        hub_id=source.path,
        revision=revision,
        requested_revision=source.revision,
        directory=None,
        split=source.split,
    )


def remember(sources: Iterable[ResolvedSource]) -> dict[str, Any]:
    """Return the `known` of the next build, ready for JSON. It contains paths: never hash it."""
    known: dict[str, Any] = {}
    for source in sources:
        if source.hub_id is not None:
            known[_hub_key(source.hub_id, source.requested_revision)] = source.revision
        for file in source.files:
            known[str(file.path)] = [*file.stamp, file.sha256]
    return known


def _local(
    source: SourceConfig,
    default_name: str,
    files: tuple[SourceFile, ...],
    *,
    directory: Path | None = None,
) -> ResolvedSource:
    return ResolvedSource(
        name=source.name or default_name,
        files=files,
        content_sha256=digest(
            [[file.format, file.compression, file.stamp.size, file.sha256] for file in files]
        ),
        hub_id=None,
        revision=None,
        requested_revision=source.revision,
        directory=directory,
        split=source.split,
    )


def _resolve_files(
    paths: list[Path], root: Path, known: Mapping[str, Any], *, fixed_format: Format | None = None
) -> tuple[SourceFile, ...]:
    """Return the files with their hashes: the remembered one, or that of the bytes."""
    files = []
    for path in paths:
        file_format, compression = (fixed_format, "") if fixed_format else _format_of(path.name)
        if file_format is None or (file_format == "parquet" and compression):
            raise DataError(
                f"{path}: unknown format; expected .jsonl or .json, each also .gz or .zst, or"
                " .parquet"
            )
        stamp = SourceStamp.of(path.stat())
        remembered = known.get(str(path))
        # All four numbers count here: the change time shows a modification time that was set back.
        if isinstance(remembered, list) and remembered[:-1] == [*stamp]:
            sha256 = str(remembered[-1])
        else:
            try:
                sha256 = sha256_file(path)
            except OSError as exc:
                raise DataError(f"{path} cannot be read: {exc}; check its permissions") from exc
            if not SourceStamp.of(path.stat()).same_content(stamp):
                raise DataError(
                    f"{path} changed while it was being read; build again when nothing writes to it"
                )
        files.append(
            SourceFile(
                path=path,
                name=Path(os.path.relpath(path, root)).as_posix(),
                format=file_format,
                compression=compression,
                stamp=stamp,
                sha256=sha256,
            )
        )
    return tuple(files)


def _format_of(name: str) -> tuple[Format | None, Compression]:
    stem, suffix = os.path.splitext(name.lower())  # noqa: PTH122 (a hub id is no path)
    compression = _COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = os.path.splitext(stem)[1]  # noqa: PTH122
    return _FORMATS.get(suffix), compression


def _stem(name: str) -> str:
    """Return a file name without `.jsonl.gz` and the like."""
    path = Path(name)
    if path.suffix.lower() in _COMPRESSIONS:
        path = path.with_suffix("")
    return path.stem if path.suffix.lower() in _FORMATS else path.name


def _hub_key(hub_id: str, revision: str) -> str:
    return f"hub:{hub_id}@{revision}"
