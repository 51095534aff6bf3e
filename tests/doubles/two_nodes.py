"""Two nodes on one machine: network namespaces with an address each, joined by a cable that can be
cut.

The only route is that between the two, so nothing leaves them. They are removed at the end in any
case.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("10.213.0.1", "10.213.0.2")

# ssh for these nodes: the line of shell runs in the namespace whose address is HOST, and ends with
# the connection.
SSH = """
import ctypes, json, os, signal, subprocess, sys
host, line = sys.argv[-2:]
node = json.loads(os.environ["NAMESPACES"])[host]
def tie():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
shell = subprocess.Popen(["ip", "netns", "exec", node, "sh", "-c", line], preexec_fn=tie)
code = shell.wait()
sys.exit(code if code >= 0 else 255)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoNodes:
    namespaces: tuple[str, str]
    interface: str

    def set_link(self, state: str) -> None:
        """Plug in (`up`) or pull (`down`) the second node's cable: packets are lost silently."""
        _ip("netns", "exec", self.namespaces[1], "ip", "link", "set", self.interface, state)


def missing() -> str | None:
    """Return why this machine cannot have two nodes, or None."""
    if shutil.which("ip") is None:
        return "no command ip (iproute2)"
    name = f"sft-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"cannot make network namespaces: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=False)
    return None


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Make the nodes for the block, and remove them."""
    names = (f"sft-{os.getpid()}-a", f"sft-{os.getpid()}-b")
    try:
        for name in names:
            _ip("netns", "add", name)
        peer = ("peer", "name", "cable0", "netns", names[1])
        _ip("-n", names[0], "link", "add", "cable0", "type", "veth", *peer)
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable0")
            for interface in ("lo", "cable0"):
                _ip("-n", name, "link", "set", interface, "up")
        yield TwoNodes(namespaces=names, interface="cable0")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def write_hostfile(folder: Path) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    return path


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
