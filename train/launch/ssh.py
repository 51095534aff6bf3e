"""One ssh for each host of a hostfile, which runs torchrun there; this process waits for them all.

DeepSpeed's own launcher would need pdsh, does not wait for a save, and never restarts a rank.
"""

import logging
import math
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from shared import atomic
from shared.errors import PrerequisiteError
from train.engine.launcher_env import die_with_parent
from train.launch.hostfile import Hosts
from train.launch.torchrun import (
    DEFAULT_PORT,
    Cluster,
    node_command,
    quote,
    rendezvous_options,
    shell_line,
)
from train.run.prepare import Prepared
from train.run.read_status import last_change, raise_unless_complete
from train.run.stop_request import STOP_SIGNALS, signal_handlers

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_FOR_THE_OTHERS = 30.0


def ssh_commands(cluster: Cluster, prepared: Prepared, hosts: Hosts) -> list[list[str]]:
    """Return the command line that starts the ranks of each host from here."""
    commands = []
    port, run_id = cluster.port or DEFAULT_PORT, prepared.run.path.name
    for number, (host, address) in enumerate(zip(hosts.names, hosts.addresses, strict=True)):
        rendezvous = rendezvous_options(
            hosts.addresses[0], port, run_id, is_host=number == 0, address=address
        )
        line = shell_line(node_command(cluster, prepared.request, rendezvous), cluster.environment)
        remote = f"cd {quote(str(Path.cwd()))} && exec {line}"
        # With -tt torchrun on the host gets SIGHUP when the connection ends, and ends its ranks.
        commands.append(["ssh", "-o", "BatchMode=yes", "-tt", host, remote])
    return commands


def run_on_hosts(commands: Sequence[Sequence[str]], prepared: Prepared, hosts: Hosts) -> None:
    """Run the commands until all have ended. Raises the SftError that ended the run.

    The output of each host goes to RUN/logs/HOST.log.
    """
    run = prepared.run
    with atomic.exclusive_lock(run.lock, f"training in {run.path}"):
        # A lock that is held is one line of error from here; from a rank it would come with
        # torchrun's report.
        pass
    before = last_change(run)
    logs = [run.path / "logs" / f"{host}.log" for host in hosts.names]
    logs[0].parent.mkdir(parents=True, exist_ok=True)
    logger.info("starting %d hosts; their output is in %s", len(commands), logs[0].parent)
    processes: list[subprocess.Popen[bytes]] = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("ab") as file:
            try:
                # In a new session: Ctrl-C in this terminal asks for a stop, and must not cut the
                # connection.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            except FileNotFoundError as exc:
                raise PrerequisiteError(
                    "no command ssh to start the other hosts with; leave --submit out"
                ) from exc
        processes.append(process)

    def ask(number: int, _frame: FrameType | None) -> None:
        logger.info("%s: the run stops after this step, and saves", signal.Signals(number).name)
        run.stop.touch()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # ssh passes no signals on, so a signal becomes the file that asks the ranks to stop. A second
    # Ctrl-C ends the connections, and with them the ranks.
    with signal_handlers(dict.fromkeys(STOP_SIGNALS, ask)):
        first = _wait(processes)
    code, message = 0, "the ranks ended without recording why"
    if first is not None:
        code, host = 1, hosts.names[first]
        message = (
            f"{host} ended with exit code {processes[first].returncode}; see {logs[first]} for the"
            " reason"
        )
    raise_unless_complete(prepared, exit_code=code, before=before, message=message)


def _wait(processes: "Sequence[subprocess.Popen[bytes]]") -> int | None:
    """Wait for all; return the index of the first that failed.

    The others then have a while to notice by themselves, as torchrun does, before they are ended.
    """
    first, deadline = None, math.inf
    while True:
        codes = [process.poll() for process in processes]
        failed = [number for number, code in enumerate(codes) if code]
        if failed and first is None:
            first, deadline = failed[0], time.monotonic() + _SECONDS_FOR_THE_OTHERS
        if None not in codes:
            return first
        if time.monotonic() > deadline:
            for process in processes:
                process.terminate()
        time.sleep(_SECONDS_BETWEEN_LOOKS)
