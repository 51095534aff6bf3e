"""`sft-prep push`: a whole, verified set to a hub data set or a directory. Sends nothing that is
there already.

verify -> for each shard: compress what is missing, commit it with transfer.json -> commit the
manifest last

So a place without manifest.json is an unfinished push, and transfer.json in it says whose, and what
has arrived.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from prep.inspection.verification.verify import verify
from prep.progress import progress
from prep.sharing.dataset_card import CARD_NAME, render_set_card
from prep.sharing.remote import DirectoryRemote, Remote, parse_repo
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
from shared.errors import ArtifactError, ConfigError, FingerprintMismatchError
from shared.hashing import canonical_json
from shared.shard_format import MANIFEST_NAME, FileEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class PushOptions:
    revision: str | None
    """Branch of a hub data set, made if it is not there; None is its main branch."""
    public: bool
    replace: bool
    """Put the set in the place of another one."""
    workers: int
    """Columns that are compressed, and files that are sent, at the same time."""


def push(shards: Path, repo: str, options: PushOptions) -> list[str]:
    """Push the set at `shards` and return what to say.

    Raises what `verify` raises before anything is sent; FingerprintMismatchError where another set
    is in the way.
    """
    contents = contents_of_set(shards)
    with _open_place(repo, options) as place:
        held = _held(place, damaged_is_none=options.replace)
        if held is not None and _is_whole(place, shards, contents, held):
            return [f"{place.label} is up to date", f"fingerprint {fingerprints(contents.sets)}"]
        if not options.replace:
            _refuse_another(place, contents, held)
        verify(shards)
        place.begin_write()
        bytes_sent = _send(place, shards, contents, workers=options.workers)
        place.publish()
    size = sum(entry.bytes for entry in contents.columns.values())
    return [
        (
            f"{shards} is pushed to {place.label}: {len(contents.columns)} columns,"
            f" {size / 2**20:,.1f} MiB, of which {bytes_sent / 2**20:,.1f} MiB compressed were"
            " sent now"
        ),
        f"fingerprint {fingerprints(contents.sets)}",
    ]


@contextlib.contextmanager
def _open_place(repo: str, options: PushOptions) -> Iterator[Remote]:
    target = parse_repo(repo)
    if isinstance(target, Path):
        if options.revision is not None:
            raise ConfigError(f"--revision is for hub data sets, {target} is a directory")
        directory = DirectoryRemote(target)
        with directory.writing():
            yield directory
        return
    from prep.sharing.hub_repo import HubRemote, Visibility

    visibility = Visibility.PUBLIC if options.public else Visibility.PRIVATE
    hub = HubRemote(
        target, revision=options.revision, visibility=visibility, workers=options.workers
    )
    with hub.writing():
        yield hub


def _held(place: Remote, *, damaged_is_none: bool) -> TransferIndex | None:
    """Return what earlier pushes say is there, if they say anything."""
    paths = place.paths()
    if TRANSFER_NAME not in paths:
        if MANIFEST_NAME in paths:
            raise ArtifactError(
                f"{place.label} has a {MANIFEST_NAME} that no push put there: no {TRANSFER_NAME};"
                " give another place"
            )
        return None
    try:
        return transfer_from_json(place.read(TRANSFER_NAME), f"{place.label}: {TRANSFER_NAME}")
    except ArtifactError:
        if damaged_is_none:
            return None
        raise


def _is_whole(place: Remote, shards: Path, contents: SetContents, held: TransferIndex) -> bool:
    """Say whether every file of the set is in its place, as far as can be told without moving
    it."""
    if held.sets != contents.sets:
        return False
    small = contents.tokenizers | {path: entry.file for path, entry in contents.sets.items()}
    return all(place.has(path, entry, shards / path) for path, entry in small.items()) and all(
        _is_sent(place, path, entry, held) for path, entry in contents.columns.items()
    )


def _is_sent(place: Remote, path: str, entry: FileEntry, held: TransferIndex | None) -> bool:
    known = held.columns.get(path) if held is not None else None
    return known is not None and known.raw == entry and place.has(path + SUFFIX, known.zstd)


def _refuse_another(place: Remote, contents: SetContents, held: TransferIndex | None) -> None:
    if held is None or fingerprints(held.sets) == fingerprints(contents.sets):
        return
    state = "the set" if MANIFEST_NAME in place.paths() else "an unfinished push of the set"
    raise FingerprintMismatchError(
        f"{place.label} holds {state} with fingerprint {fingerprints(held.sets)}, this one has "
        f"{fingerprints(contents.sets)}; give another place, or --replace to put this one there"
    )


def _send(place: Remote, shards: Path, contents: SetContents, *, workers: int) -> int:
    """Commit what is missing, the manifests last; return how many bytes of columns were sent."""
    held = _held(place, damaged_is_none=True)
    columns = {
        path: held.columns[path]
        for path, entry in contents.columns.items()
        if held is not None and _is_sent(place, path, entry, held)
    }
    found = _make_room(place, contents, columns, held)
    bytes_sent = 0
    with progress(
        "push", sum(entry.bytes for entry in contents.columns.values()), "bytes"
    ) as advance:
        for folder, paths in groupby(contents.columns, key=lambda path: path.rpartition("/")[0]):
            chosen = list(paths)
            bytes_sent += _send_shard(place, shards, contents, columns, chosen, workers=workers)
            advance(sum(contents.columns[path].bytes for path in chosen), folder)
    files: dict[str, Path | bytes] = {TRANSFER_NAME: _transfer_bytes(contents, columns)}
    if (
        not {CARD_NAME, MANIFEST_NAME} <= found
    ):  # a card beside a finished push may have been edited
        files[CARD_NAME] = render_set_card(contents)
    for path, entry in contents.tokenizers.items():
        if not place.has(path, entry, shards / path):
            files[path] = shards / path
    files |= {path: shards / path for path in contents.sets}
    wanted = {path + SUFFIX for path in columns} | contents.tokenizers.keys() | contents.sets.keys()
    stale = sorted(path for path in found - wanted if is_of_the_set(path))
    place.commit(
        files,
        remove=stale,
        message=f"Add the manifest of {contents.manifest.name}: the set is whole",
    )
    return bytes_sent


def _make_room(
    place: Remote,
    contents: SetContents,
    columns: dict[str, ColumnEntry],
    held: TransferIndex | None,
) -> set[str]:
    """Take the manifests of another set away first: its columns are about to go. Return the paths
    that are left."""
    found = place.paths()
    old = found & {MANIFEST_NAME, EVAL_MANIFEST}
    if not old or (held is not None and fingerprints(held.sets) == fingerprints(contents.sets)):
        return found
    files = {TRANSFER_NAME: _transfer_bytes(contents, columns)}
    place.commit(files, remove=sorted(old), message=f"Make room for {contents.manifest.name}")
    return found - old


def _send_shard(
    place: Remote,
    shards: Path,
    contents: SetContents,
    columns: dict[str, ColumnEntry],
    paths: list[str],
    *,
    workers: int,
) -> int:
    """Compress and commit the columns of one shard that are missing; note all of them in
    `columns`."""

    def packed(path: str) -> FileEntry:
        return compress(shards / path, place.scratch / path, contents.columns[path])

    missing = [path for path in paths if path not in columns]
    files: dict[str, Path | bytes] = {}
    with ThreadPoolExecutor(workers) as pool:
        for path, entry in zip(missing, pool.map(packed, missing), strict=True):
            raw = contents.columns[path]
            columns[path] = ColumnEntry(bytes=raw.bytes, sha256=raw.sha256, zstd=entry)
            if not place.has(path + SUFFIX, entry, place.scratch / path):
                files[path + SUFFIX] = place.scratch / path
    if files:
        files[TRANSFER_NAME] = _transfer_bytes(contents, columns)
        folder = paths[0].rpartition("/")[0]
        place.commit(files, remove=[], message=f"Add {folder} of {contents.manifest.name}")
    for path in missing:
        (place.scratch / path).unlink(missing_ok=True)
    return sum(columns[path].zstd.bytes for path in missing if path + SUFFIX in files)


def _transfer_bytes(contents: SetContents, columns: dict[str, ColumnEntry]) -> bytes:
    listed = TransferIndex(transfer_version=TRANSFER_VERSION, sets=contents.sets, columns=columns)
    return canonical_json(config.to_plain(listed))
