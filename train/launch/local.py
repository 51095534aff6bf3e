"""Start the ranks of a run on this machine, and tell how the run ended.

torchrun turns every exit code into 1, so the reason is read from status.json.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

from shared import atomic
from shared.errors import ConfigError
from train.engine.launcher_env import die_with_parent, launched
from train.launch.torchrun import standalone_command
from train.run.prepare import Prepared, check_ranks
from train.run.read_status import last_change, raise_unless_complete, status_since
from train.run.stop_request import CTRL_C_LINE, STOP_SIGNALS, SignalHandler, signal_handlers

logger = logging.getLogger(__name__)

_RANKS_PER_CORE = 4
# From the failure of one rank to the end of those that wait for it in vain.
_SECONDS_TO_FAIL = 20.0


def choose_num_ranks(wanted: int | None) -> int:
    """Return `wanted`, by default a rank for each visible GPU, or 1 without a GPU.

    Raises ConfigError for more ranks than GPUs.
    """
    import torch

    return ranks_on(torch.cuda.device_count(), wanted)


def ranks_on(num_gpus: int, wanted: int | None) -> int:
    """Return how many ranks to start on a machine with `num_gpus` visible GPUs.

    Without a GPU the ranks run on the CPU.
    """
    if wanted is None:
        return max(1, num_gpus)
    if num_gpus and wanted > num_gpus:
        raise ConfigError(
            f"--nproc-per-node {wanted}, but {num_gpus} GPUs are visible; give at most {num_gpus}"
        )
    most = _RANKS_PER_CORE * (os.cpu_count() or 1)
    if not num_gpus and wanted > most:
        raise ConfigError(
            f"--nproc-per-node {wanted} without a GPU; give at most {most}, {_RANKS_PER_CORE} per"
            " CPU core"
        )
    return wanted


Done = Literal["here", "by ranks", "before"]


def run_or_launch(prepared: Prepared, num_ranks: int | None) -> Done:
    """Train in this process, or start ranks and wait for them; return who trained.

    "before" means that another start has completed the run meanwhile. Raises the SftError that
    ended the run.
    """
    if launched():
        if num_ranks is not None:
            raise ConfigError(
                "--nproc-per-node starts ranks, but this process is one already; leave it out"
            )
    else:
        chosen = choose_num_ranks(num_ranks)
        check_ranks(prepared, chosen)
        if chosen > 1:
            launch(prepared, chosen)
            return "by ranks"
    from train.loop.rank import run_rank

    return "here" if run_rank(prepared) else "before"


def launch(prepared: Prepared, num_ranks: int) -> None:
    """Run torchrun and pass signals on to it. Raises the SftError that the ranks recorded."""
    # A held lock and a full disk are noticed here first: from here the error is one line, from a
    # rank it would come with torchrun's report.
    with atomic.exclusive_lock(prepared.run.lock, f"training in {prepared.run.path}"):
        probe = prepared.run.path / ".tmp-probe"
        atomic.write_bytes(probe, bytes(4096))
        probe.unlink()
    before = last_change(prepared.run)
    command = standalone_command(prepared.request, num_ranks)
    # In a new process group: Ctrl-C at a terminal would otherwise reach torchrun too, which takes a
    # second signal as an order to end without a save.
    with (
        subprocess.Popen(command, preexec_fn=die_with_parent, process_group=0) as process,
        signal_handlers(_forwarding_to(process)),
    ):
        code = _wait(process, lambda: status_since(prepared.run, before))
    message = f"the ranks ended with exit code {code}; see their output above for the reason"
    raise_unless_complete(prepared, exit_code=code, before=before, message=message)


def _forwarding_to(process: "subprocess.Popen[bytes]") -> dict[signal.Signals, SignalHandler]:
    """Return handlers that pass on what asks for a stop; a second Ctrl-C ends torchrun, and so the
    ranks, at once."""

    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    def stop_after_save(_number: int, _frame: FrameType | None) -> None:
        process.send_signal(signal.SIGTERM)
        sys.stderr.write(CTRL_C_LINE)
        signal.signal(signal.SIGINT, stop_at_once)

    def stop_at_once(_number: int, _frame: FrameType | None) -> None:
        process.kill()
        raise KeyboardInterrupt

    return {**dict.fromkeys(STOP_SIGNALS, forward), signal.SIGINT: stop_after_save}


def _wait(process: "subprocess.Popen[bytes]", status: Callable[[], dict[str, Any] | None]) -> int:
    """Return torchrun's exit code; kill it if a rank has failed and others still wait for it.

    torchrun would give those the time of a save, which they cannot begin without that rank.
    """
    # Ranks that notice the failure have that long to write why they ended.
    failed_for = 0.0
    while failed_for < _SECONDS_TO_FAIL:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)
        failed_for += 1.0 if (status() or {}).get("state") == "failed" else 0.0
    # The ranks die with it.
    process.kill()
    return process.wait()
