"""`sft-prep` and `sft-train` for shell scripts, forked from a process that has all imports done: a
command takes seconds less of processor time.

A folder with the two names goes to the front of PATH. What stands there hands its arguments,
directory, environment and open streams to the server, and ends with the command's exit code.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

_ASKING = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = [os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]
data = json.dumps(job).encode()
socket.send_fds(server, [len(data).to_bytes(4, "big")], [0, 1, 2])
server.sendall(data)
raise SystemExit(int(server.recv(16) or 97))
"""
_SERVER = """
import json, os, signal, socket, sys, traceback
import deepspeed, gigatoken, matplotlib.pyplot, torch, zstandard
from transformers import AutoModelForCausalLM, AutoTokenizer
import prep.build.build, prep.cli.main, prep.inspection.stats_plot, prep.sources.lines
import train.cli.main, train.estimate.plan, train.loop.rank
import train.results.ask, train.selftest.selftest

def run(client, streams):
    size = int.from_bytes(first, "big")
    data = b""
    while len(data) < size:
        data += client.recv(size - len(data))
    name, arguments, directory, environment = json.loads(data)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # a build without worker processes
    sys.argv = [name, *arguments]
    try:
        (prep.cli.main.main if name == "sft-prep" else train.cli.main.main)()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    client.sendall(str(code).encode())
    os._exit(0)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
while True:
    client, _ = server.accept()
    first, streams, _, _ = socket.recv_fds(client, 4, 3)
    if not os.fork():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            run(client, streams)
        finally:
            os._exit(1)
    client.close()
    for stream in streams:
        os.close(stream)
"""


class WarmCommands:
    """A server for both commands, and the folder with their names."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """Start the server; `environment` is what the libraries read when they are imported."""
        self.folder = folder
        folder.mkdir(parents=True)
        self._socket = Path(tempfile.mkdtemp())  # a path in a test's folder may be too long for one
        address = self._socket / "s"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(address)], env=dict(environment)
        )
        for name in ("sft-prep", "sft-train"):
            script = folder / name
            script.write_text(_ASKING.format(python=sys.executable, address=str(address)))
            script.chmod(0o755)
        end = time.monotonic() + 120
        while not address.exists():
            assert self._process.poll() is None, "the server did not start"
            assert time.monotonic() < end, "the server did not start in time"
            time.sleep(0.05)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._socket)


def on_path(folder: Path) -> str:
    """Return a PATH that begins with `folder`, then the environment of the tests."""
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
