"""Which files in a directory are ours, and removal of these alone, file by file.

Whatever else lies there (notes, a link, a folder) stays and keeps its directory.
"""

import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from shared.shard_format import EVAL_DIR, SHARDS_DIR, TOKENIZER_DIR

_NUM_SHOWN = 5
# directories of a set, which a killed build may leave empty
_OWN_FOLDERS: set[tuple[str, ...]] = {(), (EVAL_DIR,), (SHARDS_DIR,), (TOKENIZER_DIR,)}

logger = logging.getLogger(__name__)


def shown(names: Collection[str]) -> str:
    """Return the first five of `names`, and how many more there are."""
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(list(names)[:_NUM_SHOWN]) + more


def sort_out(path: Path, is_own: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Return the files below `path` that are ours, and everything else. `is_own` takes a path
    relative to `path`.

    A link is never ours. An empty directory is ours if a set has one of that name, or if `is_own`
    accepts `NAME/`.
    """
    ours: list[str] = []
    foreign: list[str] = []
    for folder, folders, files in os.walk(path):
        inside = Path(folder).relative_to(path)
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in [*files, *links]:
            relative, file = (inside / name).as_posix(), Path(folder) / name
            is_plain = file.is_file() and not file.is_symlink()
            (ours if is_plain and is_own(relative) else foreign).append(relative)
        is_empty, name = not files and not folders, f"{inside.as_posix()}/"
        if is_empty and inside.parts[:1] not in _OWN_FOLDERS and not is_own(name):
            foreign.append(name)
    return ours, sorted(foreign)


def remove_own(path: Path, is_own: Callable[[str], bool], *, last: Collection[str]) -> bool:
    """Remove the directory at `path` if everything in it is ours; return whether it is gone.

    Files with a name in `last` are removed last, so that a kill leaves something that the next
    build still recognises.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    ours, foreign = sort_out(path, is_own)
    if foreign:
        logger.warning(
            "%s is not removed: it contains files that are not ours: %s", path, shown(foreign)
        )
        return False
    for name in sorted(ours, key=lambda name: (Path(name).name in last, -name.count("/"), name)):
        (path / name).unlink(missing_ok=True)
    for folder, _, _ in os.walk(path, topdown=False):
        Path(folder).rmdir()
    return True
