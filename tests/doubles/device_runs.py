"""Runs of `sft-train` on the second device of tests/second_device, or on the CPU for comparison."""

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
    """Run `commands` one after the other, in one process per rank; return the results on rank 0.

    `built`: the module of the device, or "cpu".
    """
    ports = _free_ports(len(commands) if num_ranks > 1 else 0)
    file = folder / "commands.json"
    file.write_text(json.dumps([[str(argument) for argument in command] for command in commands]))
    # An earlier test in this process may have set the variable, to the CPU: that must not matter.
    inherited = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    processes = []
    for rank in range(num_ranks):
        environment = {**inherited, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        if num_ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1"}
            environment |= {"SECOND_DEVICE_PORTS": " ".join(map(str, ports))}
        command = [sys.executable, PROGRAM, built, file, folder / f"results-{rank}.json"]
        log = (folder / f"log-{rank}.txt").open("w")
        processes.append(
            subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environment)
        )
        log.close()
    try:
        # Long, since machines may be busy; a process that hangs must end all the same.
        codes = [process.wait(timeout=1200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * num_ranks, [
        (folder / f"log-{rank}.txt").read_text()[-3000:] for rank in range(num_ranks)
    ]
    results: list[dict[str, Any]] = json.loads((folder / "results-0.json").read_text())
    return results


def succeeded(result: dict[str, Any]) -> dict[str, Any]:
    """Return `result`; fail with the output of its command if that did not end well."""
    assert result["exit_code"] == 0, f"{result['output'][-2000:]}\n{result['problem']}"
    return result


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
