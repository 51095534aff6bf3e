"""What a build may take the place of: a set of ours and what a killed build left. Nothing else is
ever deleted.

A set is known by its manifest, of any format version. What is deleted is deleted file by file:
those that the manifest lists (or, in a staged directory that has none yet, those that a build
writes). A file of anybody else keeps its directory where it is.
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

_MARKS = {
    "format_version",
    "fingerprint",
    "inputs_digest",
    "chat_template",
    "tokenizer",
    "shards",
    "totals",
}
_LONGEST_NAME = 200  # bytes: the names beside it are longer by `.tmp-`, a process number and `-old`
_BESIDE = (BUILD_INFO_NAME, REJECTS_NAME)
_STAGED = re.compile(
    rf"(?:{EVAL_DIR}/)?(?:{SHARDS_DIR}/\d{{5,}}/(?:{'|'.join(COLUMNS)})\.npy"
    rf"|{TOKENIZER_DIR}/(?:{'|'.join(map(re.escape, FILE_NAMES))})"
    rf"|(?:\.tmp-)?(?:{re.escape(MANIFEST_NAME)}|{re.escape(BUILD_INFO_NAME)}|{re.escape(REJECTS_NAME)})(?:-\d+)?)"
)


def place_of(out: Path) -> Path:
    """Return `out` with `~` expanded. Raises ConfigError for a name that no set can have."""
    try:
        out = out.expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"{out}: there is no such user; write the path out") from exc
    here = Path.cwd()
    full = here / os.path.normpath(out)  # links are not followed
    if out.name in ("", "..") or full == here or full in here.parents:
        raise ConfigError(
            f"{out} is the current directory or holds it; expected a directory for the set alone"
        )
    if len(os.fsencode(out.name)) > _LONGEST_NAME:
        raise ConfigError(
            f"the name of {str(out)[:60]}... has more than {_LONGEST_NAME} bytes; give a"
            " shorter one"
        )
    try:
        os.lstat(full)
    except FileNotFoundError:
        pass
    except NotADirectoryError as exc:
        raise ArtifactError(f"{out} lies below a file; give another place") from exc
    except OSError as exc:
        raise ArtifactError(f"{str(out)[:200]}: {exc.strerror}; give another place") from exc
    return out


def is_free(out: Path) -> bool:
    """Say whether nothing is at `out`, or an empty directory, which a set may take over."""
    if out.is_symlink():
        return False
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def check_replaceable(out: Path) -> None:
    """Raise ArtifactError unless a set may be put at `out`: it is free, or holds a set of ours and
    nothing more."""
    if is_free(out):
        return
    advice = "it is never replaced: give another place, or move it away"
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
            f"{out} holds files that are not of the set: {shown(foreign)}; move them away, or give"
            " another place"
        )


def foreign_files(path: Path) -> list[str]:
    """Return what lies below the directory `path` and is no part of the set there, or of one being
    written."""
    return sort_out(path, _own_names(path))[1]


def remove(path: Path) -> bool:
    """Remove the set, or the beginning of one, at `path`; return whether all is gone. Files of
    others stay."""
    return remove_own(path, _own_names(path), last={MANIFEST_NAME})


def clear(out: Path) -> None:
    """Put right what killed builds left beside `out`, and in its place. Call it under the lock of
    `out`.

    An old set that a kill between two renames left aside is put back; what is no set is not
    touched.
    """
    names = re.compile(rf"\.tmp-{re.escape(out.name)}-\d+(-old)?", re.DOTALL)
    beside = [
        path
        for path in sorted(out.parent.glob(".tmp-*"))
        if names.fullmatch(path.name) and path.is_dir()
    ]
    if not os.path.lexists(out):
        for path in beside:
            if path.name.endswith("-old") and _listing(path) is not None and not path.is_symlink():
                os.rename(path, out)
                break
    for path in beside:
        remove(path)


def _own_names(path: Path) -> Callable[[str], bool]:
    """Return which names below `path` are of the set there, or of the beginning of one."""
    listed = _listing(path)
    return (
        listed.__contains__
        if listed is not None
        else lambda name: _STAGED.fullmatch(name) is not None
    )


def _listing(path: Path) -> set[str] | None:
    """Return the files that the manifest at `path` lists, those beside it too; None where none of
    ours is there."""
    try:
        data = json.loads((path / MANIFEST_NAME).read_bytes())
        if (
            not isinstance(data, dict)
            or not data.keys() >= _MARKS
            or not isinstance(data["format_version"], int)
        ):
            return None
        found = {
            MANIFEST_NAME,
            *_BESIDE,
            *(f"{TOKENIZER_DIR}/{name}" for name in data["tokenizer"]["files"]),
        }
        found |= {f"{shard['path']}/{name}" for shard in data["shards"] for name in shard["files"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    inner = _listing(path / EVAL_DIR) if path.name != EVAL_DIR else None
    return found | {f"{EVAL_DIR}/{name}" for name in inner or ()}
