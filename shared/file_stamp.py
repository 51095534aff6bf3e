"""Whether a file that is mapped is still what it was when it was opened: a stat, not a look at its
bytes.

Reading a mapped page that a truncated file no longer has kills the process (SIGBUS); a file written
anew under its name is not what the mapping shows. Both are found by size, inode and time of change.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared.errors import ArtifactError


@dataclass(frozen=True, kw_only=True, slots=True)
class MappedFileStamp:
    """A file as it was when it was opened."""

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
                f"{self.path} {_UNDER_US}: it cannot be found any more ({exc.strerror}); {_WAY_OUT}"
            ) from exc
        if now == self:
            return
        if now.num_bytes != self.num_bytes:
            change = f"it has {now.num_bytes} bytes, it had {self.num_bytes} when it was opened"
        elif now.inode != self.inode:
            change = "another file lies at its place"
        else:
            change = "it was written to"
        raise ArtifactError(f"{self.path} {_UNDER_US}: {change}; {_WAY_OUT}")


_UNDER_US = "was changed while it was in use"
_WAY_OUT = (
    "put the shard set back as it was (sft-prep verify checks it), then run the same command again"
)


def stamp(path: Path, opened: IO[bytes]) -> MappedFileStamp:
    """Return the stamp of a file that is open."""
    return _stamp(path, os.fstat(opened.fileno()))


def _stamp(path: Path, stat: os.stat_result) -> MappedFileStamp:
    return MappedFileStamp(
        path=path, num_bytes=stat.st_size, inode=stat.st_ino, changed_ns=stat.st_mtime_ns
    )
