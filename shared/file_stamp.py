"""Whether a mapped file is still the one that was opened: by a stat, without reading its bytes.

Reading a mapped page that a truncated file no longer has kills the process (SIGBUS), and a new file
of the same name is not what the mapping shows. Size, inode and time of change tell both.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared.errors import ArtifactError


@dataclass(frozen=True, kw_only=True, slots=True)
class MappedFileStamp:
    """What identified a file when it was opened."""

    path: Path
    num_bytes: int
    inode: int
    changed_ns: int

    def check(self) -> None:
        """Raise ArtifactError, naming the file, if it was truncated, replaced, written to or
        removed since."""
        try:
            now = _stamp(self.path, self.path.stat())
        except OSError as exc:
            raise ArtifactError(
                f"{self.path} {_CHANGED}: it cannot be found any more ({exc.strerror}); {_REMEDY}"
            ) from exc
        if now == self:
            return
        if now.num_bytes != self.num_bytes:
            change = f"it has {now.num_bytes} bytes, it had {self.num_bytes} when it was opened"
        elif now.inode != self.inode:
            change = "another file has its name"
        else:
            change = "it was written to"
        raise ArtifactError(f"{self.path} {_CHANGED}: {change}; {_REMEDY}")


_CHANGED = "was changed while it was in use"
_REMEDY = (
    "put the shard set back as it was (sft-prep verify checks it), then run the same command again"
)


def stamp(path: Path, opened: IO[bytes]) -> MappedFileStamp:
    """Return the stamp of a file that is open."""
    return _stamp(path, os.fstat(opened.fileno()))


def _stamp(path: Path, stat: os.stat_result) -> MappedFileStamp:
    return MappedFileStamp(
        path=path, num_bytes=stat.st_size, inode=stat.st_ino, changed_ns=stat.st_mtime_ns
    )
