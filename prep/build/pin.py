"""Write the commits that a mixture's revisions name now into its file, so that it means the same
next year.

The file is edited line by line: comments and order stay. What was edited is read back and compared
with what was meant before it is written.
"""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prep.config import shipped_mixtures
from prep.sources.hub_dataset import resolve_commit
from prep.tokenization.tokenizer import resolve_tokenizer_commit
from shared import atomic, config
from shared.errors import ConfigError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HEADER = re.compile(r"^\s*(\[\[?)\s*([A-Za-z0-9_.-]+)\s*\]\]?")
_KEY = re.compile(r"^\s*([A-Za-z0-9_-]+)\s*=")


Revision = tuple[str, int, dict[str, Any], str, Callable[[str, str], str]]
"""A table, its number among those of that name, its content, the hub id or path in it, and how to
resolve that."""


def pin(mixture: str, out: Path | None) -> list[str]:
    """Pin every hub revision of `mixture` (one that ships, or a .toml file); return what was done,
    a line each.

    A file is changed in place unless `out` is given; one that ships is written to NAME.toml here.
    Raises ConfigError for a file whose tables are not written out, or whose local paths would mean
    others at `out`, and DataError for what the hub does not have.
    """
    shipped = shipped_mixtures()
    path = shipped.get(mixture, Path(mixture))
    target = out or (Path(f"{mixture}.toml") if mixture in shipped else path)
    tables = config.load_toml(path)
    base = path.resolve().parent
    lines = path.read_text(encoding="utf-8").split("\n")
    told = []
    for place, number, table, name, resolve in _revisions(tables):
        if (base / Path(name).expanduser()).exists() or name.startswith((".", "/", "~")):
            if target.resolve().parent != base:
                raise ConfigError(
                    f"{path}: {name!r} is a path beside it; pin the file in place, without --out"
                )
            told.append(f"{name}: local, named by its content")
            continue
        revision = table.get("revision", "main")
        if _COMMIT.fullmatch(revision):
            told.append(f"{name}: {revision}, pinned before")
            continue
        commit = resolve(name, revision)
        table["revision"] = commit
        _set_revision(lines, place, number, commit)
        told.append(f"{name}: {revision} is {commit}")
    text = "\n".join(lines)
    if tomllib.loads(text) != tables:
        raise ConfigError(
            f"{path}: its tables are not written as [tokenizer] and [[sources]] with a key a line;"
            " do so"
        )
    atomic.write_bytes(target, text.encode("utf-8"))
    return [*told, str(target)]


def _revisions(tables: dict[str, Any]) -> list[Revision]:
    found: list[Revision] = [
        ("tokenizer", 0, tables["tokenizer"], tables["tokenizer"]["name"], resolve_tokenizer_commit)
    ]
    found += [
        ("sources", i, source, source["path"], resolve_commit)
        for i, source in enumerate(tables["sources"])
    ]
    return found


def _set_revision(lines: list[str], table: str, number: int, commit: str) -> None:
    """Change the line `revision = ...` of a table, or add one below its first key."""
    start = _header_line(lines, table, number)
    if start is None:
        return  # the comparison that follows says what is wrong
    written = f'revision = "{commit}"'
    first_key = None
    for index in range(start + 1, len(lines)):
        if _HEADER.match(lines[index]):
            break
        key = _KEY.match(lines[index])
        if key and key[1] == "revision":
            lines[index] = written
            return
        if key and first_key is None:
            first_key = index
    if first_key is not None:
        lines.insert(first_key + 1, written)


def _header_line(lines: list[str], table: str, number: int) -> int | None:
    headers = [
        i for i, line in enumerate(lines) if (match := _HEADER.match(line)) and match[2] == table
    ]
    return headers[number] if number < len(headers) else None
