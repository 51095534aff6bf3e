"""What a build may replace: a set of ours, and what a killed build left. Nothing else is ever
deleted.

A set is recognised by its manifest, of any format version. Its files are deleted one by one: those
that the manifest lists or, in a staged directory without a manifest, those that a build writes. A
directory that contains any other file stays.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from prep.tokenization.tokenizer import FILE_NAMES
from prep.writing.owned_files import remove_own, shown, sort_out
from shared.errors import ArtifactError, ConfigError
from shared.shard_format import (
    BUILD_INFO_NAME,
    COLUMNS,
    EVAL_DIR,
    MANIFEST_NAME,
    REJECTS_NAME,
    SHARDS_DIR,
    TOKENIZER_DIR,
)

# keys that the manifest of every format version has, and hardly another program's manifest.json
_KEYS_OF_A_MANIFEST = {
    "format_version",
    "fingerprint",
    "inputs_digest",
    "chat_template",
    "tokenizer",
    "shards",
    "totals",
}
# Bytes. File systems allow 255, and names beside it add `.tmp-`, a process number and `-old`.
_LONGEST_NAME = 200
_BESIDE = (BUILD_INFO_NAME, REJECTS_NAME)
_STAGED = re.compile(
    rf"(?:{EVAL_DIR}/)?(?:{SHARDS_DIR}/\d{{5,}}/(?:{'|'.join(COLUMNS)})\.npy"
    rf"|{TOKENIZER_DIR}/(?:{'|'.join(map(re.escape, FILE_NAMES))})"
    rf"|(?:\.tmp-)?(?:{'|'.join(map(re.escape, (MANIFEST_NAME, *_BESIDE)))})(?:-\d+)?)"
)


def place_of(out: Path) -> Path:
    """Return `out` with `~` expanded. Raises ConfigError for a name that no set can have."""
    try:
        out = out.expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"{out}: there is no such user; give the full path") from exc
    cwd = Path.cwd()
    full = cwd / os.path.normpath(out)  # links are not followed
    if out.name in ("", "..") or full == cwd or full in cwd.parents:
        raise ConfigError(
            f"{out} is the current directory or contains it; expected a directory for the set alone"
        )
    if len(os.fsencode(out.name)) > _LONGEST_NAME:
        raise ConfigError(
            f"the name of {str(out)[:60]}... has {len(os.fsencode(out.name))} bytes; expected at"
            f" most {_LONGEST_NAME}, give a shorter one"
        )
    try:
        os.lstat(full)
    except FileNotFoundError:
        pass
    except NotADirectoryError as exc:
        raise ArtifactError(f"{out} lies below a file; give another directory") from exc
    except OSError as exc:
        raise ArtifactError(f"{str(out)[:200]}: {exc.strerror}; give another directory") from exc
    return out


def is_free(out: Path) -> bool:
    """Say whether `out` does not exist or is an empty directory, which a set may use."""
    if out.is_symlink():
        return False
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def check_replaceable(out: Path) -> None:
    """Raise ArtifactError unless a set may be put at `out`: it is free, or contains a set of ours
    and nothing else."""
    if is_free(out):
        return
    advice = "it is never replaced: give another directory, or move it away"
    if out.is_symlink():
        raise ArtifactError(f"{out} is a symbolic link to {out.readlink()}; {advice}")
    if not out.is_dir():
        raise ArtifactError(f"{out} is a file; {advice}")
    if _listing(out) is None:
        raise ArtifactError(
            f"{out} is a directory without the {MANIFEST_NAME} of a shard set; {advice}"
        )
    foreign = foreign_files(out)
    if foreign:
        raise ArtifactError(
            f"{out} contains files that are not of the set: {shown(foreign)}; move them away, or"
            " give another directory"
        )


def foreign_files(path: Path) -> list[str]:
    """Return everything below the directory `path` that does not belong to the set there, or to one
    that is being written."""
    return sort_out(path, _own_names(path))[1]


def remove(path: Path) -> bool:
    """Remove the set at `path`, or the beginning of one; return whether it is gone. Other files
    stay."""
    return remove_own(path, _own_names(path), last={MANIFEST_NAME})


def clear(out: Path) -> None:
    """Clean up what killed builds left beside `out`. Call it under the lock of `out`.

    A build replaces a set by two renames: the old one away, the new one in. If a kill came between
    them, the old set is put back. What is no set is not touched.
    """
    names = re.compile(rf"\.tmp-{re.escape(out.name)}-\d+(-old)?", re.DOTALL)
    leftovers = [
        path
        for path in sorted(out.parent.glob(".tmp-*"))
        if names.fullmatch(path.name) and path.is_dir()
    ]
    if not os.path.lexists(out):
        for path in leftovers:
            if path.name.endswith("-old") and _listing(path) is not None and not path.is_symlink():
                os.rename(path, out)
                break
    for path in leftovers:
        remove(path)


def _own_names(path: Path) -> Callable[[str], bool]:
    """Return the test for names below `path` that belong to the set there, or to the beginning of
    one."""
    listed = _listing(path)
    if listed is not None:
        return listed.__contains__
    return lambda name: _STAGED.fullmatch(name) is not None


def _listing(path: Path) -> set[str] | None:
    """Return the files that the manifest at `path` lists, and those beside it; None if it is not a
    manifest of ours."""
    try:
        data = json.loads((path / MANIFEST_NAME).read_bytes())
        if (
            not isinstance(data, dict)
            or not data.keys() >= _KEYS_OF_A_MANIFEST
            or not isinstance(data["format_version"], int)
        ):
            return None
        names = {
            MANIFEST_NAME,
            *_BESIDE,
            *(f"{TOKENIZER_DIR}/{name}" for name in data["tokenizer"]["files"]),
            *(f"{shard['path']}/{name}" for shard in data["shards"] for name in shard["files"]),
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    inner = _listing(path / EVAL_DIR) if path.name != EVAL_DIR else None
    return names | {f"{EVAL_DIR}/{name}" for name in inner or ()}
