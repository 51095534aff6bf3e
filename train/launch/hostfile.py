"""A DeepSpeed hostfile: `HOST slots=N` lines, comments and blank lines, read as DeepSpeed does."""

import re
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError

_LINE = re.compile(r"(?P<host>[A-Za-z0-9_.:@%-]+)\s+slots=(?P<slots>[0-9]+)(\s*#.*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hosts:
    """The hosts of a file, in its order; the first is the head."""

    names: tuple[str, ...]
    """What ssh connects to: HOST or USER@HOST."""
    slots: int

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the hosts reach one another: the names without USER@."""
        return tuple(name.rpartition("@")[2] for name in self.names)


def read_hostfile(path: Path) -> Hosts:
    """Return the hosts of `path`. Raises ConfigError for the first line that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the hostfile {path}: {exc}") from exc
    slots_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        match = _LINE.fullmatch(content)
        if match is None or match["host"].startswith("-") or int(match["slots"]) < 1:
            raise ConfigError(
                f"{path} line {number}: {content!r}; expected `HOST slots=N` with N of 1 or more"
            )
        host, slots = match["host"], int(match["slots"])
        if host in slots_of:
            raise ConfigError(
                f"{path} line {number}: {host} is listed twice; give each host one line"
            )
        # torchrun takes one --nproc-per-node for all nodes.
        if slots_of and slots not in slots_of.values():
            first = next(iter(slots_of))
            raise ConfigError(
                f"{path} line {number}: {host} has {slots} slots and {first} has {slots_of[first]};"
                " every node runs the same number of ranks, so make them equal or leave hosts out"
            )
        slots_of[host] = slots
    if not slots_of:
        raise ConfigError(f"{path} names no host; expected lines like `node1 slots=8`")
    return Hosts(names=tuple(slots_of), slots=next(iter(slots_of.values())))
