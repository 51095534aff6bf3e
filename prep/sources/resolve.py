"""Where rows come from: a source of the mixture -> its files and what identifies their content.

Identity never contains a path or a time: the same bytes at another place are the same source. File
hashes are remembered by path, size, times and inode: a second build need not read a terabyte to
learn that nothing changed.
"""

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


@dataclass(frozen=True, slots=True)
class SourceStamp:
    """What changes when somebody writes to a file."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "SourceStamp":
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def same_content(self, other: "SourceStamp") -> bool:
        """Say whether nobody wrote in between; a new name or mode, which only moves the change
        time, is no write."""
        return (self.size, self.mtime_ns, self.inode) == (other.size, other.mtime_ns, other.inode)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    path: Path
    name: str
    """For messages and reject lists: the path below the directory that all files of the source
    share."""
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
    """Of the files' formats, sizes and hashes, in order; None for a hub data set, whose commit says
    it."""
    hub_id: str | None
    revision: str | None
    """The resolved commit of a hub data set."""
    asked_revision: str
    directory: Path | None
    """Set for a directory laid out like a hub data set."""
    split: str
    group_of: str = ""
    """The name of the whole source, where this is one of the groups that it was split into."""

    def identity(self) -> dict[str, str]:
        """Return what determines the rows, in terms that hold on any machine."""
        if self.content_sha256 is not None:
            return {"content_sha256": self.content_sha256}
        return {"hub_id": str(self.hub_id), "revision": str(self.revision), "split": self.split}


def resolve_source(source: SourceConfig, base: Path, known: Mapping[str, Any]) -> ResolvedSource:
    """Return the files or the hub commit behind `source`; a relative path is below `base`.

    `known` is what `remember` returned for an earlier build: an unchanged file is not hashed again,
    and a moving hub revision stays at the commit it had. Pass an empty mapping to look again.
    Raises DataError.
    """
    place = Path(os.path.normpath(base / Path(source.path).expanduser()))
    if place.is_dir():
        paths = hub_dataset.files_of_directory(place, source.split)
        files = _resolve_files(paths, place, known, fixed_format="datasets")
        return _local(source, source.name or place.name, files, directory=place)
    if place.is_file():
        return _local(
            source, source.name or _stem(place.name), _resolve_files([place], place.parent, known)
        )
    if _GLOB.search(source.path):
        paths = sorted(map(Path, glob.glob(str(place), recursive=True)), key=os.fsencode)  # noqa: PTH207 (absolute)
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise DataError(f"no file matches {source.path!r} below {base}; check the glob")
        shared_root = Path(os.path.commonpath([path.parent for path in paths]))
        return _local(
            source,
            source.name or _glob_name(source.path),
            _resolve_files(paths, shared_root, known),
        )
    if _HUB_ID.fullmatch(source.path) and not _format_of(source.path)[0]:
        return _hub(source, known)
    raise DataError(
        f"no file {source.path!r} below {base}; give a file, a glob, a directory or the id of a hub"
        " data set"
    )


def remember(sources: Iterable[ResolvedSource]) -> dict[str, Any]:
    """Return the JSON-ready memory of `sources` for the `known` of the next build. It holds paths:
    never hash it."""
    known: dict[str, Any] = {}
    for source in sources:
        if source.hub_id is not None:
            known[_hub_key(source.hub_id, source.asked_revision)] = source.revision
        for file in source.files:
            stamp = file.stamp
            known[str(file.path)] = [
                stamp.size,
                stamp.mtime_ns,
                stamp.ctime_ns,
                stamp.inode,
                file.sha256,
            ]
    return known


def _local(
    source: SourceConfig, name: str, files: tuple[SourceFile, ...], *, directory: Path | None = None
) -> ResolvedSource:
    return ResolvedSource(
        name=name,
        files=files,
        content_sha256=digest(
            [[file.format, file.compression, file.stamp.size, file.sha256] for file in files]
        ),
        hub_id=None,
        revision=None,
        asked_revision=source.revision,
        directory=directory,
        split=source.split,
    )


def _hub(source: SourceConfig, known: Mapping[str, Any]) -> ResolvedSource:
    revision = known.get(_hub_key(source.path, source.revision))
    if not isinstance(revision, str):
        revision = hub_dataset.resolve_commit(source.path, source.revision)
    return ResolvedSource(
        name=source.name or source.path,
        files=(),
        content_sha256=None,
        hub_id=source.path,
        revision=revision,
        asked_revision=source.revision,
        directory=None,
        split=source.split,
    )


def _resolve_files(
    paths: list[Path], root: Path, known: Mapping[str, Any], *, fixed_format: Format | None = None
) -> tuple[SourceFile, ...]:
    files = []
    for path in paths:
        name = Path(os.path.relpath(path, root)).as_posix()
        file_format, compression = (fixed_format, "") if fixed_format else _format_of(path.name)
        if file_format is None or (file_format == "parquet" and compression):
            raise DataError(
                f"{path}: unknown format; expected .jsonl or .json, each also .gz or .zst, or"
                " .parquet"
            )
        stamp, sha256 = _hash(path, known.get(str(path)))
        files.append(
            SourceFile(
                path=path,
                name=name,
                format=file_format,
                compression=compression,
                stamp=stamp,
                sha256=sha256,
            )
        )
    return tuple(files)


def _hash(path: Path, remembered: Any) -> tuple[SourceStamp, str]:
    stamp = SourceStamp.of(path.stat())
    # all four are compared here: the change time catches a modification time that was set back
    if isinstance(remembered, list) and remembered[:-1] == [
        stamp.size,
        stamp.mtime_ns,
        stamp.ctime_ns,
        stamp.inode,
    ]:
        return stamp, str(remembered[-1])
    try:
        sha256 = sha256_file(path)
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc}; check its permissions") from exc
    if not SourceStamp.of(path.stat()).same_content(stamp):
        raise DataError(
            f"{path} changed while it was being read; build again when nothing writes to it"
        )
    return stamp, sha256


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


def _glob_name(pattern: str) -> str:
    """Return the plain words of a glob's last part, or the directory it looks in:
    `conversations/*.jsonl.gz`."""
    parts = Path(pattern).parts
    words = re.sub(r"\[[^]]*\]|[*?]+", "-", _stem(parts[-1])).strip("-_.")
    plain = [part for part in parts[:-1] if not _GLOB.search(part) and part not in ("/", ".", "..")]
    return words or (plain[-1] if plain else "rows")


def _hub_key(hub_id: str, revision: str) -> str:
    return f"hub:{hub_id}@{revision}"
