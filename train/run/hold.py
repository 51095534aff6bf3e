"""One start at a time in a run directory: rank 0 holds the lock and decides what is left to do."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from shared import atomic
from shared.disk import unwritable
from shared.errors import SftError
from train.engine.process_group import Ranks, broadcast_from_main
from train.run.directory import write_status
from train.run.prepare import Prepared, decide_again
from train.run.read_status import error_of


@contextlib.contextmanager
def holding_run(prepared: Prepared, ranks: Ranks) -> Iterator[Prepared | None]:
    """Keep other starts out of the run directory; give what is left to do, None if it is complete.

    `prepare` may have looked an hour ago, before another start trained on. So rank 0 decides again
    under the lock. A refusal reaches every rank, so that all of them end with its exit code.
    """
    # What rank 0 sends to the others: a word and where to resume, or an error and its exit code.
    verdict: tuple[str, object] = ("", None)
    # The lock is held until the block of the caller ends.
    with contextlib.ExitStack() as lock:
        refusal: SftError | OSError | None = None
        if ranks.is_main:
            try:
                lock.enter_context(
                    atomic.exclusive_lock(prepared.run.lock, f"training in {prepared.run.path}")
                )
                decided = decide_again(prepared)
                if not decided.is_complete:
                    write_status(prepared.run, "running", exit_code=None, message="")
                verdict = ("complete" if decided.is_complete else "resume", decided.resume_from)
            except (SftError, OSError) as exc:
                refusal = exc
                known = exc if isinstance(exc, SftError) else unwritable(exc)
                verdict = (" ".join(str(exc).split()), known.exit_code if known is not None else 1)
        word, detail = cast(tuple[str, object], broadcast_from_main(verdict, ranks))
        # Rank 0 raises the error itself, with its traceback; the others one of the same class.
        if refusal is not None:
            raise refusal
        if word not in ("complete", "resume"):
            raise error_of(detail)(word)
        yield (
            None if word == "complete" else replace(prepared, resume_from=cast(Path | None, detail))
        )
