"""The torchrun command of one node, and what the launchers of many nodes share.

Who starts it on each node (SLURM, ssh, a person) is not known here. All nodes see the same
directories at the same paths: the working directory, the shard set, the run, and this Python.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from shared.errors import ConfigError
from train.run.command_line import console_script, rank_arguments
from train.run.prepare import TrainRequest

DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """How many ranks start where, and how failures and stops are treated."""

    num_nodes: int
    gpus_per_node: int
    """Also the ranks of a node: one for each GPU."""
    max_restarts: int = 3
    """How often torchrun restarts all ranks after one failed; they resume from the last
    checkpoint."""
    seconds_to_save: int = 600
    """Time between the request to stop and the kill."""
    port: int | None = None
    """Of torchrun's rendezvous on the head node; None: chosen by the launcher."""
    environment: tuple[str, ...] = ()
    """NAME=VALUE, set for the ranks of every node."""

    def __post_init__(self) -> None:
        for setting in self.environment:
            if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", setting):
                raise ConfigError(
                    f"--env {setting}: expected NAME=VALUE, as in NCCL_SOCKET_IFNAME=eth0"
                )

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node


class ShellWord(str):
    """A word of a command line that is shell text already, as `"$head"`: it is not quoted again."""

    __slots__ = ()


def node_command(cluster: Cluster, request: TrainRequest, rendezvous: Sequence[str]) -> list[str]:
    """Return the words, not yet quoted for a shell, that start the ranks of one node.

    `rendezvous` are the options of torchrun that say where the nodes meet. They always name the
    node that hosts it (`is_host`), since torchrun's guess compares host names and fails for a
    second network card or an alias.
    """
    shape = ["--nnodes", str(cluster.num_nodes), "--nproc-per-node", str(cluster.gpus_per_node)]
    return _torchrun(
        "torch.distributed.run",
        [*shape, "--rdzv-backend", "c10d", *rendezvous],
        request,
        max_restarts=cluster.max_restarts,
        seconds_to_save=cluster.seconds_to_save,
    )


def standalone_command(request: TrainRequest, num_ranks: int) -> list[str]:
    """Return the command that starts all ranks on this machine, without torchrun's tracebacks."""
    return _torchrun(
        "train.launch.elastic",
        ["--standalone", "--nproc-per-node", str(num_ranks)],
        request,
        max_restarts=0,
        seconds_to_save=600,
    )


def _torchrun(
    module: str,
    shape: Sequence[str],
    request: TrainRequest,
    *,
    max_restarts: int,
    seconds_to_save: int,
) -> list[str]:
    """Return torchrun's command for the ranks of one node.

    The ranks run the console script, never `-m train`: the working directory may hold a train.py.
    torchrun itself runs with -P for the same reason. It must pass SIGUSR1 on, and wait for a save
    before it kills.
    """
    return [
        *(sys.executable, "-P", "-m", module, *shape),
        *("--max-restarts", str(max_restarts)),
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
        *("--shutdown-timeout", str(seconds_to_save)),
        *("--no-python", str(console_script())),
        # torchrun replaces $local_rank, ${local_rank} and $$ in the words of a rank
        *(word.replace("$", "$$") for word in rank_arguments(request)),
    ]


def rendezvous_options(
    head: str, port: int, run_id: str, *, is_host: bool, address: str | None = None
) -> list[str]:
    """Return torchrun's options for a rendezvous on `head`; `address` is where others reach this
    node."""
    # The brackets of an IPv6 address.
    host = f"[{head}]" if ":" in head else head
    return [
        *("--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", run_id),
        *("--rdzv-conf", f"is_host={int(is_host)}"),
        *([] if address is None else ["--local-addr", address]),
    ]


def shell_line(words: Sequence[str], environment: Sequence[str] = ()) -> str:
    """Return `words` as one line of shell that means exactly them, with `environment` set for the
    command."""
    return " ".join(map(quote, [*(["env", *environment] if environment else []), *words]))


def shell_lines(words: Sequence[str]) -> str:
    """Return `words` quoted, an option with its value a line: for people to read and change."""
    lines: list[str] = []
    for word in words:
        if lines and not word.startswith("--"):
            lines[-1] += f" {quote(word)}"
        else:
            lines.append(quote(word))
    return " \\\n    ".join(lines)


def quote(word: str) -> str:
    """Return `word` for a POSIX shell, which reads it as exactly that."""
    return word if isinstance(word, ShellWord) else shlex.quote(word)
