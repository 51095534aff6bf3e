"""Kill a run at a moment that its directory shows, and tell afterwards in which phase it was."""

import contextlib
import fcntl
import math
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from train_runs import command, records

# checkpoint.keep_last of the recipe.
KEPT = 2


def rank_processes(launcher: int) -> list[int]:
    """Return the ranks that a running `sft-train` has started, by rank."""
    pids = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            items = (folder / "environ").read_text().split("\0")
            variables = dict(item.partition("=")[::2] for item in items if item)
            parent = _parent_of(folder.name)
            grandparent = _parent_of(parent)
        except (OSError, ValueError):
            continue
        if "RANK" in variables and grandparent == launcher:
            pids[int(variables["RANK"])] = int(folder.name)
    return [pids[rank] for rank in sorted(pids)]


def _parent_of(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def last_step(run: Path) -> int:
    """Return the last step that metrics.jsonl holds."""
    try:
        return max((record["step"] for record in records(run)), default=0)
    except (OSError, ValueError):
        # The file does not exist yet, or a line is being written.
        return 0


def newest_checkpoint(run: Path) -> int:
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=0)


def moment(run: Path, phase: str, draw: random.Random) -> Callable[[], bool]:
    """Return a function that tells when to kill a call that starts now."""
    begun, target = newest_checkpoint(run), newest_checkpoint(run) + draw.randint(1, 5)
    description = run / "config.json"
    changed = description.stat().st_mtime_ns if description.exists() else 0
    return {
        "start": lambda: description.exists() and description.stat().st_mtime_ns != changed,
        "steps": lambda: last_step(run) >= target and newest_checkpoint(run) >= begun,
        "write": lambda: any(
            not path.name.endswith("-old") for path in run.glob("checkpoints/.tmp-step-*")
        ),
        "engine": lambda: any(run.glob("checkpoints/.tmp-step-*/engine/*")),
        "state": lambda: any(run.glob("checkpoints/.tmp-step-*/rng/*")),
        "retire": lambda: (
            any(run.glob("checkpoints/.tmp-step-*-old"))
            or len(list(run.glob("checkpoints/step-*"))) > KEPT
        ),
        "export": lambda: any(run.glob(".tmp-*model*")),
        "exported": lambda: (run / "model").exists(),
    }[phase]


def kill_at(run: Path, phase: str, draw: random.Random, *arguments: object) -> str:
    """Start `sft-train`, SIGKILL it or one of its ranks at a moment of `phase`, and return the
    phase that the kill interrupted.

    A 2 among `arguments` is the number of ranks; without it the command is the only rank.
    """
    has_come = moment(run, phase, draw)
    before = last_step(run)
    process = subprocess.Popen(
        command(*arguments),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    alone, ranks, look_again = draw.random() < 0.5, [], 0.0 if 2 in arguments else math.inf
    try:
        deadline = time.monotonic() + 240
        while not has_come() and time.monotonic() < deadline:
            assert process.poll() is None, f"the run ended before it could be killed in {phase}"
            if time.monotonic() > look_again:
                # Looked up in advance, so that the kill does not come late.
                ranks, look_again = rank_processes(process.pid), time.monotonic() + 0.25
            time.sleep(0.0005)
        pause = draw.uniform(0, 3.0 if phase == "start" else 0.02)
        time.sleep(pause if phase == "start" else draw.choice([0.0, 0.0, pause]))
        victims = draw.sample(ranks, min(1, len(ranks))) if alone else ranks
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        if alone and victims:
            process.wait(timeout=120)
    finally:
        process.kill()
        process.wait()
    wait_for_the_dying(run)
    return phase_of(run, before)


def wait_for_the_dying(run: Path) -> None:
    """Return when no rank holds the lock of the run any more."""
    with (run / ".lock").open("r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)


def phase_of(run: Path, step_before: int) -> str:
    """Say what a killed run was doing, from what it left behind."""
    return next(phase for phase, applies in _signs(run, step_before) if applies)


def _signs(run: Path, step_before: int) -> Iterator[tuple[str, bool]]:
    yield "inside the export", any(run.glob(".tmp-*model*"))
    yield "after the export", (run / "model").exists()
    left = [path.name for path in run.glob("checkpoints/.tmp-step-*")]
    yield "inside a checkpoint's write", any(not name.endswith("-old") for name in left)
    yield (
        "between rename and retention",
        bool(left) or len(list(run.glob("checkpoints/step-*"))) > KEPT,
    )
    yield "between steps", last_step(run) != step_before
    yield "start", True
