"""A request for a build, and what the build may know from an existing set."""

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
    scheduler: str = ""  # address of a Dask scheduler, "" for processes on this machine


def known_facts(request: BuildRequest) -> dict[str, Any]:
    """Return what an existing set recorded: hashes of its files, and the date of its template.

    An unreadable record is no error: the files are hashed again.
    """
    # The date outlives --rehash: it is no hash, but an input that the set has fixed.
    known: dict[str, Any] = {}
    unreadable = (OSError, ValueError, KeyError, TypeError)
    with contextlib.suppress(*unreadable):
        if not request.rehash:
            known = dict(json.loads((request.out / BUILD_INFO_NAME).read_bytes())["known"])
    with contextlib.suppress(*unreadable):
        manifest = json.loads((request.out / MANIFEST_NAME).read_bytes())
        known[KNOWN_DATE] = manifest["config"]["template"]["date"]
    return known
