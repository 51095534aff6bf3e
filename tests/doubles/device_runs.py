"""Runs of `sft-train` on the second device of tests/second_device, or on the CPU to compare with;
one or more ranks."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from repository import TESTS

PROGRAM = TESTS / "second_device" / "run.py"


def run_all(
    built: Path | str, commands: Sequence[Sequence[object]], folder: Path, *, num_ranks: int = 1
) -> list[dict[str, Any]]:
    """Run `commands`, one after the other in one process a rank; return what rank 0 found of each.

    `built`: the module of the device, or "cpu".
    """
    ports = _free_ports(len(commands) if num_ranks > 1 else 0)
    given = folder / "commands.json"
    given.write_text(json.dumps([[str(argument) for argument in command] for command in commands]))
    inherited = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    # a run in the process of the tests has set that one, to the CPU: which test came before must
    # not matter
    processes = []
    for rank in range(num_ranks):
        environment = {**inherited, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        if num_ranks > 1:
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": num_ranks,
                "LOCAL_WORLD_SIZE": num_ranks,
            }
            environment |= {name: str(value) for name, value in place.items()}
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "SECOND_DEVICE_PORTS": " ".join(map(str, ports)),
            }
        command = [sys.executable, PROGRAM, built, given, folder / f"found-{rank}.json"]
        log = (folder / f"log-{rank}.txt").open("w")
        processes.append(
            subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environment)
        )
        log.close()
    try:
        codes = [
            process.wait(timeout=1200) for process in processes
        ]  # for one that hangs: machines may be busy
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * num_ranks, [
        (folder / f"log-{rank}.txt").read_text()[-3000:] for rank in range(num_ranks)
    ]
    found: list[dict[str, Any]] = json.loads((folder / "found-0.json").read_text())
    return found


def succeeded(found: dict[str, Any]) -> dict[str, Any]:
    """Return `found` of a command that ended well; say what it wrote where it did not."""
    assert found["exit_code"] == 0, f"{found['output'][-2000:]}\n{found['problem']}"
    return found


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
