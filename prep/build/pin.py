"""Write the commits that a mixture's revisions name now into its file, so that it means the same
next year.

The file is edited line by line: comments and order stay. The edited text is parsed and compared
with the intended tables before it is written.
"""

import re
import tomllib
from pathlib import Path

from prep.config import shipped_mixtures
from prep.sources.hub_dataset import resolve_commit
from prep.tokenization.tokenizer import resolve_tokenizer_commit
from shared import atomic, config
from shared.errors import ConfigError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HEADER = re.compile(r"^\s*(\[\[?)\s*([A-Za-z0-9_.-]+)\s*\]\]?")
_KEY = re.compile(r"^\s*([A-Za-z0-9_-]+)\s*=")


def pin(mixture: str, out: Path | None) -> list[str]:
    """Pin every hub revision of `mixture` (one that ships, or a .toml file).

    Returns a line for each repository. A file is changed in place unless `out` is given; a mixture
    that ships is written to NAME.toml here. Raises ConfigError for a file whose tables are not
    written out, or whose local paths would mean others at `out`, and DataError for what the hub
    does not have.
    """
    shipped = shipped_mixtures()
    path = shipped.get(mixture, Path(mixture))
    target = out or (Path(f"{mixture}.toml") if mixture in shipped else path)
    tables = config.load_toml(path)
    base = path.resolve().parent
    lines = path.read_text(encoding="utf-8").split("\n")
    report = []
    tokenizer = tables["tokenizer"]
    for header, number, table, name, resolve in (
        ("tokenizer", 0, tokenizer, tokenizer["name"], resolve_tokenizer_commit),
        *(
            ("sources", number, source, source["path"], resolve_commit)
            for number, source in enumerate(tables["sources"])
        ),
    ):
        # The same rule as for a source: what exists, or looks like a path, is no hub id.
        if (base / Path(name).expanduser()).exists() or name.startswith((".", "/", "~")):
            if target.resolve().parent != base:
                raise ConfigError(
                    f"{path}: {name!r} is a path beside it; pin the file in place, without --out"
                )
            report.append(f"{name}: local, identified by its content")
            continue
        revision = table.get("revision", "main")
        if _COMMIT.fullmatch(revision):
            report.append(f"{name}: {revision}, pinned before")
            continue
        commit = resolve(name, revision)
        table["revision"] = commit
        _set_revision(lines, header, number, commit)
        report.append(f"{name}: {revision} is {commit}")
    # TOML has many spellings, and the edit knows one: the result must parse to what is meant.
    text = "\n".join(lines)
    if tomllib.loads(text) != tables:
        raise ConfigError(
            f"{path}: cannot edit its revisions line by line; write its tables as [tokenizer] and"
            " [[sources]], each key on a line"
        )
    atomic.write_bytes(target, text.encode("utf-8"))
    return [*report, str(target)]


def _set_revision(lines: list[str], table: str, number: int, commit: str) -> None:
    """Change the line `revision = ...` of a table, or add one below its first key.

    Where the table has no header or no key, nothing changes, and `pin` finds that the
    text does not have the intended tables.
    """
    headers = [
        index
        for index, line in enumerate(lines)
        if (match := _HEADER.match(line)) and match[2] == table
    ]
    start = headers[number] + 1 if number < len(headers) else len(lines)
    new_line = f'revision = "{commit}"'
    first_key = None
    for index in range(start, len(lines)):
        if _HEADER.match(lines[index]):
            break
        key = _KEY.match(lines[index])
        if key and key[1] == "revision":
            lines[index] = new_line
            return
        if key and first_key is None:
            first_key = index
    if first_key is not None:
        lines.insert(first_key + 1, new_line)
