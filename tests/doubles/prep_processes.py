"""sft-prep in processes of its own: as a user starts it, or forked from one that has all imports
done.

The forked ones are quick, and something can be done to them at any change they make to the file
system: they count those (files opened for writing, renames, directories made, files and directories
removed).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep_builds import chat, mixture_of, small_tokenizer, write_rows, write_toml

SFT_PREP = Path(sys.executable).parent / "sft-prep"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"

_FORKING = """
import json, os, signal, sys, traceback
import gigatoken, zstandard
from transformers import AutoTokenizer
import prep.build.build, prep.cli.main, prep.sources.lines, prep.writing.manifest

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
_WRITING = os.O_WRONLY | os.O_RDWR

def run(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["chunk_lines"]:
        prep.sources.lines.MAX_LINES = job["chunk_lines"]
    changes = 0
    acting = False
    def on_event(event, details):
        nonlocal changes, acting
        writes = event == "open" and isinstance(details[2], int) and details[2] & _WRITING
        if acting or not (writes or event in CHANGES):
            return
        named = event == "os.rename" and os.fspath(details[1]) == job["before_rename_to"]
        if changes == job["at"] or named:
            acting = True
            exec(job["then"], globals())
            acting = False
        changes += 1
    sys.addaudithook(on_event)
    sys.argv = ["sft-prep", *job["arguments"]]
    try:
        prep.cli.main.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    sys.stdout.flush()
    with open(job["log"] + ".changes", "w") as file:
        file.write(str(changes))
    os._exit(code)

for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            run(json.loads(line))
        finally:
            traceback.print_exc()
            os._exit(99)
    _, status, usage = os.wait4(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    code: int  # negative: the signal that ended it
    output: str  # stdout and stderr
    changes: int  # made to the file system, -1 where it did not live to say
    peak_kib: int


class ForkedPrep:
    """A process with all imports done, from which builds are forked."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        arguments: Sequence[Any],
        *,
        at: int = -1,
        before_rename_to: Path | None = None,
        then: str = KILL,
        chunk_lines: int = 0,
    ) -> Ended:
        """Run `sft-prep *arguments`; `then` is executed in it before change number `at`, or before
        that rename."""
        job = {
            "arguments": [str(argument) for argument in arguments],
            "at": at,
            "before_rename_to": str(before_rename_to) if before_rename_to else None,
            "then": then,
            "chunk_lines": chunk_lines,
            "log": str(self._log),
        }
        changes = Path(f"{self._log}.changes")
        changes.unlink(missing_ok=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code, peak_kib = json.loads(self._process.stdout.readline())
        made = int(changes.read_text()) if changes.exists() else -1
        return Ended(code, self._log.read_text(encoding="utf-8"), made, peak_kib)

    def close(self) -> None:
        self._process.communicate("")


class PrepCase:
    """Two sources `a` and `b`, their mixture file, and the manifest of an undisturbed build."""

    def __init__(self, folder: Path, rows: tuple[int, int], **tables: Any) -> None:
        self.folder = folder
        sources = [
            write_rows(folder / f"{name}.jsonl", short_rows(n))
            for name, n in zip("ab", rows, strict=True)
        ]
        self.tables = {**mixture_of(sources, small_tokenizer(folder / "small")), **tables}
        self.file = write_toml(folder / "case.toml", self.tables)

    def arguments(
        self, place: Path, *, file: Path | None = None, store: Path | None = None, workers: int = 1
    ) -> Any:
        """Return the arguments of a build to `place`/out."""
        return [
            "build",
            "--mixture",
            file or self.file,
            "--out",
            place / "out",
            "--store",
            store or place / "store",
            "--workers",
            workers,
        ]

    def build(self, forked: ForkedPrep) -> None:
        """Make the undisturbed set, in the case's folder."""
        ended = forked.run(self.arguments(self.folder))
        assert ended.code == 0, ended.output


def short_rows(number: int) -> list[dict[str, Any]]:
    """Return rows of one turn, different ones for each number."""
    draw = random.Random(number)
    words = [
        "fish",
        "thanks",
        "What is",
        "The answer",
        "caf\u00e9",
        "144",
        "\n\n",
        "bye",
        "<think>",
        "Hello there!",
    ]
    return [
        chat(*(" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(2)))
        for _ in range(number)
    ]


def manifest_bytes(place: Path) -> bytes:
    """Return the manifest of the set at `place`/out as it lies on disk."""
    return (place / "out" / "manifest.json").read_bytes()


def start(arguments: Sequence[Any]) -> "subprocess.Popen[str]":
    """Start the installed command as the leader of a process group of its own.

    Interrupts are on, as at a terminal: who runs the tests in the background of a shell hands down
    that they are not.
    """
    command = [str(SFT_PREP), *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(
    found: Callable[[], Any], process: "subprocess.Popen[str] | None" = None, seconds: float = 60
) -> Any:
    """Return the first true value of `found()`; fail if `process` ends before, or time runs out."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it did not happen in time"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.005)
    return value


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    """Return the ids of the worker processes of a build."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended and waits to be asked for its exit code does
    not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def leftovers(folder: Path) -> list[str]:
    """Return what writers that died left below a folder."""
    names = [*folder.rglob(".tmp-*"), *folder.rglob(".*.new")]
    return sorted(os.fspath(path.relative_to(folder)) for path in names)
