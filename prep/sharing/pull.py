"""`sft-prep pull`: fetch a pushed set from a hub data set or a directory, check every digest, whole
or not at all.

    transfer.json, manifest.json -> columns into `.tmp-NAME-pull` -> verify -> rename

Valid files of a pull that was stopped, or of a damaged set that is pulled again, are not fetched
again.
"""

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prep.inspection.verification.verify import verify
from prep.progress import progress
from prep.sharing.remote import Remote, open_remote, parse_repo
from prep.sharing.wire_format import (
    SUFFIX,
    TRANSFER_NAME,
    SetContents,
    TransferIndex,
    check_file,
    contents_of,
    contents_of_set,
    decompress,
    fingerprints,
    matches,
    transfer_from_json,
)
from prep.writing import replaceable_set
from shared import atomic
from shared.errors import (
    ArtifactError,
    ChecksumError,
    FingerprintMismatchError,
    IncompleteArtifactError,
)
from shared.hashing import sha256_bytes
from shared.shard_format import MANIFEST_NAME
from shared.shard_reader import check_hashes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PullOptions:
    revision: str | None
    """Branch, tag or commit of a hub data set; None is its main branch."""
    replace: bool
    """Replace another set at the destination."""
    workers: int
    """Files that are fetched at the same time."""


@dataclass(frozen=True, slots=True)
class _Pushed:
    """A pushed set: where it is, and what its transfer.json and manifests list."""

    remote: Remote
    index: TransferIndex
    manifests: dict[str, bytes]
    contents: SetContents


def pull(repo: str, out: Path | None, options: PullOptions) -> list[str]:
    """Pull a set to `out` (by default `data_cache/` and the last part of `repo`); return the lines
    that report it.

    Raises ChecksumError for bytes that are not the ones pushed, FingerprintMismatchError if another
    set is in the way, IncompleteArtifactError if the push was not finished.
    """
    remote = open_remote(repo, revision=options.revision, public=False, workers=options.workers)
    remote.look()
    pushed = _read_description(remote)
    if out is None:
        target = parse_repo(repo)
        name = target.resolve().name if isinstance(target, Path) else target.rpartition("/")[2]
        out = Path("data_cache") / name
    out = replaceable_set.place_of(out)
    fingerprint = f"fingerprint {fingerprints(pushed.contents.sets)}"
    try:
        with atomic.exclusive_lock(out.parent / f".{out.name}.lock", f"writing {out}"):
            replaceable_set.clear(out)
            if _is_current(out, pushed, options):
                return [f"{out} is up to date", fingerprint]
            replaceable_set.check_replaceable(out)
            bytes_fetched = _pull(pushed, out.resolve(), workers=options.workers)
    except OSError as exc:
        raise ArtifactError(
            f"cannot pull to {out}: {exc.strerror or exc}; what has arrived is kept beside it, the"
            " same command resumes"
        ) from exc
    size = sum(entry.bytes for entry in pushed.contents.columns.values())
    return [
        (
            f"{out} is pulled from {remote.label}: {len(pushed.contents.columns)} columns,"
            f" {size / 2**20:,.1f} MiB, of which {bytes_fetched / 2**20:,.1f} MiB compressed were"
            " fetched now"
        ),
        fingerprint,
    ]


def _read_description(remote: Remote) -> _Pushed:
    """Return what the remote lists that it holds, checked to agree with itself."""
    paths = remote.paths()
    if TRANSFER_NAME not in paths:
        raise ArtifactError(
            f"{remote.label} holds no set that sft-prep push put there: it has no {TRANSFER_NAME}"
        )
    if MANIFEST_NAME not in paths:
        raise IncompleteArtifactError(
            f"{remote.label} holds an unfinished push: it has no {MANIFEST_NAME}; push the set"
            " again, it resumes"
        )
    index = transfer_from_json(remote.read(TRANSFER_NAME), f"{remote.label}: {TRANSFER_NAME}")
    manifests = {path: remote.read(path) for path in index.sets}
    for path, entry in index.sets.items():
        if sha256_bytes(manifests[path]) != entry.sha256:
            raise ChecksumError(
                f"{remote.label}: {path} has sha256 {sha256_bytes(manifests[path])[:16]}...,"
                f" {TRANSFER_NAME} says {entry.sha256[:16]}...; push the set again"
            )
    contents = contents_of(manifests, remote.label)
    for path, raw in contents.columns.items():
        if path not in index.columns or index.columns[path].raw != raw:
            raise ChecksumError(
                f"{remote.label}: {TRANSFER_NAME} and the manifest differ in {path}; push the set"
                " again with --replace"
            )
    return _Pushed(remote, index, manifests, contents)


def _is_current(out: Path, pushed: _Pushed, options: PullOptions) -> bool:
    """Return whether `out` is the set, by its bytes. Raises ArtifactError if something else is in
    the way."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if (out / TRANSFER_NAME).exists() or not (out / MANIFEST_NAME).is_file():
        raise ArtifactError(
            f"{out} is there and is no shard set; give another place, or move it away"
        )
    try:
        sets = contents_of_set(out).sets
    except ArtifactError:
        if options.replace:
            return False
        raise
    if fingerprints(sets) != fingerprints(pushed.contents.sets):
        if options.replace:
            return False
        raise FingerprintMismatchError(
            f"{out} is the set with fingerprint {fingerprints(sets)}, {pushed.remote.label}"
            f" holds {fingerprints(pushed.contents.sets)}; give another place, or --replace to put"
            " that one there"
        )
    # the manifests agree, so the set is current unless a file was damaged since
    try:
        for path in sets:
            check_hashes((out / path).parent)
    except (ChecksumError, IncompleteArtifactError) as exc:
        logger.warning("%s; fetching what is damaged", exc)
        return False
    return True


def _pull(pushed: _Pushed, out: Path, *, workers: int) -> int:
    """Make the set beside `out` and put it there; return how many bytes of columns were fetched."""
    staging = out.with_name(f".tmp-{out.name}-pull")
    # transfer.json in the staging directory tells whose files lie there: a pull of the same push
    # resumes, another one starts over
    marker = pushed.remote.read(TRANSFER_NAME)
    if not (staging / TRANSFER_NAME).is_file() or (staging / TRANSFER_NAME).read_bytes() != marker:
        if staging.exists() and any(staging.iterdir()) and not (staging / TRANSFER_NAME).is_file():
            raise ArtifactError(f"{staging} is in the way and was made by no pull; move it away")
        shutil.rmtree(staging, ignore_errors=True)  # it holds files of another set
        staging.mkdir(parents=True)
        atomic.write_bytes(staging / TRANSFER_NAME, marker)
    scratch = staging / ".download"
    shutil.rmtree(scratch, ignore_errors=True)

    bytes_fetched = 0
    columns = pushed.contents.columns
    total = sum(entry.bytes for entry in columns.values())
    paths = [*columns, *pushed.contents.tokenizers]
    with progress("pull", total, "bytes") as advance, ThreadPoolExecutor(workers) as pool:
        fetched = pool.map(lambda path: _fetch_file(pushed, path, staging, out, scratch), paths)
        for path, num_bytes in zip(paths, fetched, strict=True):
            bytes_fetched += num_bytes
            advance(columns[path].bytes if path in columns else 0, path)
    for path, data in pushed.manifests.items():
        atomic.write_bytes(staging / path, data)
    verify(staging)
    shutil.rmtree(scratch, ignore_errors=True)
    # it belongs to the push, not to the set
    (staging / TRANSFER_NAME).unlink()
    atomic.fsync_tree(staging)
    atomic.replace_dir(staging, out, remove_old=replaceable_set.remove)
    return bytes_fetched


def _fetch_file(pushed: _Pushed, path: str, staging: Path, out: Path, scratch: Path) -> int:
    """Put one file of the set into `staging`; return how many bytes of a column were fetched."""
    remote, target = pushed.remote, staging / path
    where = f"{remote.label}: {path}"
    expected = pushed.contents.columns.get(path) or pushed.contents.tokenizers[path]
    if matches(target, expected):
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    if matches(out / path, expected):
        target.unlink(missing_ok=True)
        try:
            os.link(out / path, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(out / path, target)
        return 0
    if path in pushed.contents.columns:
        entry = pushed.index.columns[path]
        with remote.local_copy(path + SUFFIX, scratch) as stored:
            decompress(stored, target, entry, where=where + SUFFIX)
        return entry.zstd.bytes
    with remote.local_copy(path, scratch) as stored:
        check_file(stored, expected, where=where)
        shutil.copyfile(stored, target)
    return 0
