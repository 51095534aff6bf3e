"""What is asked of a build, and what it may know from the set that is there."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.config import MixtureConfig
from prep.inputs import KNOWN_DATE
from shared.shard_format import BUILD_INFO_NAME, MANIFEST_NAME


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """A mixture and where its set and its samples lie."""

    mixture: MixtureConfig
    base: Path  # the directory that paths in the mixture are relative to
    out: Path
    store: Path
    workers: int
    rehash: bool
    scheduler: str = ""  # address of a Dask scheduler, "" for processes here


def known_facts(request: BuildRequest) -> dict[str, Any]:
    """Return what the set that is there recorded: hashes of files that need no second look, and its
    day."""
    known: dict[str, Any] = {}
    unreadable = (OSError, ValueError, KeyError, TypeError)  # without a record, files are hashed
    with contextlib.suppress(*unreadable):
        if not request.rehash:
            known = dict(json.loads((request.out / BUILD_INFO_NAME).read_bytes())["known"])
    with contextlib.suppress(*unreadable):
        manifest = json.loads((request.out / MANIFEST_NAME).read_bytes())
        known[KNOWN_DATE] = manifest["config"]["template"]["date"]
    return known
