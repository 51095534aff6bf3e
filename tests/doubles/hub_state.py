"""What the writable hub of the tests keeps: repositories of commits, large files, counts, and the
faults to come."""

import hashlib
import threading
from collections import Counter
from dataclasses import dataclass, field

TOKEN = "hf_of_the_writer"


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Blob:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.lfs else git_hash(self.data)


@dataclass
class Fault:
    """What to do instead of answering the next request whose `METHOD /path` holds `match`."""

    match: str
    action: str  # "500" and the like | "cut" in mid-transfer | "hold" until `released`
    times: int = 1
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, Blob]]
    branches: dict[str, str]
    messages: list[str] = field(default_factory=list)

    def files(self, branch: str = "main") -> dict[str, Blob]:
        return self.commits[self.branches[branch]]


@dataclass
class Hub:
    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    uploads: Counter[str] = field(default_factory=Counter)  # by sha256: whole files received
    downloads: Counter[str] = field(default_factory=Counter)  # by path: whole files and ranges sent
    requests: list[str] = field(default_factory=list)
    token: str = TOKEN
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, match: str, action: str, times: int = 1) -> Fault:
        self.faults.append(Fault(match, action, times))
        return self.faults[-1]

    def writes(self) -> list[str]:
        """Return the requests that would change something."""
        return [line for line in self.requests if line.split()[0] in ("POST", "PUT", "DELETE")]

    def replace(self, repo: str, path: str, data: bytes | None) -> None:
        """Damage the head of main behind everyone's back; None removes the file."""
        files = self.repositories[repo].files()
        if data is None:
            del files[path]
        else:
            files[path] = Blob(data, files[path].lfs)

    def commit(
        self, repository: Repository, branch: str, files: dict[str, Blob], message: str
    ) -> str:
        listed = repr(sorted((path, blob.oid) for path, blob in files.items()))
        sha = hashlib.sha1(f"{len(repository.commits)}{listed}{message}".encode()).hexdigest()
        repository.commits[sha] = files
        repository.branches[branch] = sha
        repository.messages.append(message)
        return sha
