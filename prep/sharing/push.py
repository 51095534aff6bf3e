"""`sft-prep push`: send a whole, verified set to a hub data set or a directory, but no file that is
there already.

verify -> for each shard: compress what is missing, commit it with transfer.json -> commit the
manifest last

So a remote without manifest.json holds an unfinished push, and its transfer.json tells of which set
and which columns have arrived.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from prep.inspection.verification.verify import verify
from prep.progress import progress
from prep.sharing.dataset_card import CARD_NAME, render_set_card
from prep.sharing.remote import Remote, open_remote
from prep.sharing.replaceable_push import is_of_the_set
from prep.sharing.wire_format import (
    EVAL_MANIFEST,
    SUFFIX,
    TRANSFER_NAME,
    TRANSFER_VERSION,
    ColumnEntry,
    SetContents,
    TransferIndex,
    compress,
    contents_of_set,
    fingerprints,
    transfer_from_json,
)
from shared import config
from shared.errors import ArtifactError, FingerprintMismatchError
from shared.hashing import canonical_json
from shared.shard_format import MANIFEST_NAME, FileEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class PushOptions:
    revision: str | None
    """Branch of a hub data set, created if it does not exist; None is its main branch."""
    public: bool
    replace: bool
    """Replace another set there."""
    workers: int
    """Columns that are compressed, and files that are sent, at the same time."""


def push(shards: Path, repo: str, options: PushOptions) -> list[str]:
    """Push the set at `shards`; return the lines that report it.

    Raises what `verify` raises before anything is sent, and FingerprintMismatchError if the remote
    holds another set.
    """
    contents = contents_of_set(shards)
    fingerprint = fingerprints(contents.sets)
    remote = open_remote(
        repo, revision=options.revision, public=options.public, workers=options.workers
    )
    with remote.writing():
        index = _read_index(remote, damaged_is_none=options.replace)
        small = contents.tokenizers | {path: entry.file for path, entry in contents.sets.items()}
        if (
            index is not None
            and index.sets == contents.sets
            and all(remote.has(path, entry, shards / path) for path, entry in small.items())
            and all(
                _is_sent(remote, path, entry, index) for path, entry in contents.columns.items()
            )
        ):
            return [f"{remote.label} is up to date", f"fingerprint {fingerprint}"]
        other = fingerprint if index is None else fingerprints(index.sets)
        if other != fingerprint and not options.replace:
            state = (
                "the set" if MANIFEST_NAME in remote.paths() else "an unfinished push of the set"
            )
            raise FingerprintMismatchError(
                f"{remote.label} holds {state} with fingerprint {other}, this one has"
                f" {fingerprint}; give another place, or --replace to put this one there"
            )
        # only now: it reads every byte, which an up-to-date or refused push does not need
        verify(shards)
        remote.begin_write()
        bytes_sent = _send(remote, shards, contents, workers=options.workers)
        remote.publish()
    size = sum(entry.bytes for entry in contents.columns.values())
    return [
        (
            f"{shards} is pushed to {remote.label}: {len(contents.columns)} columns,"
            f" {size / 2**20:,.1f} MiB, of which {bytes_sent / 2**20:,.1f} MiB compressed were"
            " sent now"
        ),
        f"fingerprint {fingerprint}",
    ]


def _read_index(remote: Remote, *, damaged_is_none: bool) -> TransferIndex | None:
    """Return the transfer.json of earlier pushes, if there is one."""
    paths = remote.paths()
    if TRANSFER_NAME not in paths:
        if MANIFEST_NAME in paths:
            raise ArtifactError(
                f"{remote.label} has a {MANIFEST_NAME} that no push put there: no {TRANSFER_NAME};"
                " give another place"
            )
        return None
    try:
        return transfer_from_json(remote.read(TRANSFER_NAME), f"{remote.label}: {TRANSFER_NAME}")
    except ArtifactError:
        if damaged_is_none:
            return None
        raise


def _is_sent(remote: Remote, path: str, entry: FileEntry, index: TransferIndex | None) -> bool:
    known = index.columns.get(path) if index is not None else None
    return known is not None and known.raw == entry and remote.has(path + SUFFIX, known.zstd)


def _send(remote: Remote, shards: Path, contents: SetContents, *, workers: int) -> int:
    """Commit what is missing, the manifests last; return how many bytes of columns were sent."""
    index = _read_index(remote, damaged_is_none=True)
    columns = {
        path: index.columns[path]
        for path, entry in contents.columns.items()
        if index is not None and _is_sent(remote, path, entry, index)
    }
    # the manifests of another set go first: from here on its columns are replaced, so that nobody
    # may take it for a whole one
    paths = remote.paths()
    old = paths & {MANIFEST_NAME, EVAL_MANIFEST}
    if old and (index is None or fingerprints(index.sets) != fingerprints(contents.sets)):
        remote.commit(
            {TRANSFER_NAME: _transfer_bytes(contents, columns)},
            remove=sorted(old),
            message=f"Make room for {contents.manifest.name}",
        )
        paths -= old
    bytes_sent, size = 0, sum(entry.bytes for entry in contents.columns.values())
    with progress("push", size, "bytes") as advance:
        for folder, group in groupby(contents.columns, key=lambda path: path.rpartition("/")[0]):
            of_shard = list(group)
            bytes_sent += _send_shard(remote, shards, contents, columns, of_shard, workers=workers)
            advance(sum(contents.columns[path].bytes for path in of_shard), folder)
    files: dict[str, Path | bytes] = {TRANSFER_NAME: _transfer_bytes(contents, columns)}
    # the card beside a finished push stays: somebody may have edited it
    if not {CARD_NAME, MANIFEST_NAME} <= paths:
        files[CARD_NAME] = render_set_card(contents)
    for path, entry in contents.tokenizers.items():
        if not remote.has(path, entry, shards / path):
            files[path] = shards / path
    files |= {path: shards / path for path in contents.sets}
    wanted = {path + SUFFIX for path in columns} | contents.tokenizers.keys() | contents.sets.keys()
    remote.commit(
        files,
        remove=sorted(path for path in paths - wanted if is_of_the_set(path)),
        message=f"Add the manifest of {contents.manifest.name}: the set is whole",
    )
    return bytes_sent


def _send_shard(
    remote: Remote,
    shards: Path,
    contents: SetContents,
    columns: dict[str, ColumnEntry],
    paths: list[str],
    *,
    workers: int,
) -> int:
    """Compress and commit the missing columns of one shard; add all of them to `columns`."""

    def compressed(path: str) -> FileEntry:
        return compress(shards / path, remote.scratch / path, contents.columns[path])

    # one shard at a time, so that the compressed copies need a shard of space, not a set
    missing = [path for path in paths if path not in columns]
    files: dict[str, Path | bytes] = {}
    with ThreadPoolExecutor(workers) as pool:
        for path, entry in zip(missing, pool.map(compressed, missing), strict=True):
            raw = contents.columns[path]
            columns[path] = ColumnEntry(bytes=raw.bytes, sha256=raw.sha256, zstd=entry)
            if not remote.has(path + SUFFIX, entry, remote.scratch / path):
                files[path + SUFFIX] = remote.scratch / path
    if files:
        files[TRANSFER_NAME] = _transfer_bytes(contents, columns)
        folder = paths[0].rpartition("/")[0]
        remote.commit(files, remove=[], message=f"Add {folder} of {contents.manifest.name}")
    for path in missing:
        (remote.scratch / path).unlink(missing_ok=True)
    return sum(columns[path].zstd.bytes for path in missing if path + SUFFIX in files)


def _transfer_bytes(contents: SetContents, columns: dict[str, ColumnEntry]) -> bytes:
    index = TransferIndex(transfer_version=TRANSFER_VERSION, sets=contents.sets, columns=columns)
    return canonical_json(config.to_plain(index))
