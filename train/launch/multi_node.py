"""`sft-train launch`: check a run as its start would, then print or run what starts it on many
nodes."""

import socket
from dataclasses import dataclass, replace
from pathlib import Path

from shared.errors import ConfigError
from train.data.tokenizer_match import check_tokenizer
from train.launch import slurm, ssh
from train.launch.hostfile import read_hostfile
from train.launch.slurm import SlurmOptions
from train.launch.torchrun import (
    DEFAULT_PORT,
    Cluster,
    node_command,
    quote,
    rendezvous_options,
    shell_line,
)
from train.run.command_line import request_arguments
from train.run.prepare import Prepared, TrainRequest, check_ranks, prepare


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchRequest:
    """The options of `sft-train launch` that all three ways to start share."""

    train: TrainRequest
    num_nodes: int | None
    gpus_per_node: int | None
    max_restarts: int
    seconds_to_save: int
    port: int | None
    environment: tuple[str, ...]
    submit: bool


def launch_by_slurm(request: LaunchRequest, options: SlurmOptions) -> str:
    """Return the batch script, or sbatch's answer to it. Raises ConfigError and what `prepare`
    raises."""
    cluster, prepared = _check(request)
    if prepared.is_complete:
        return _nothing_to_do(prepared)
    script = slurm.batch_script(cluster, prepared, options)
    return slurm.submit(script) if request.submit else script.rstrip("\n")


def launch_by_hand(request: LaunchRequest, head: str | None) -> str:
    """Return the lines to run on the head, by default this machine, and on the others."""
    if request.submit:
        raise ConfigError(
            "--submit starts nothing with --torchrun: run the lines that it prints, each on its"
            " node"
        )
    cluster, prepared = _check(request)
    if prepared.is_complete:
        return _nothing_to_do(prepared)
    # A head of one node needs no name that others can resolve.
    address = head if head is not None else socket.getfqdn()
    if cluster.num_nodes > 1 and address.startswith("localhost"):
        raise ConfigError(
            f"the head is {address}, which other nodes cannot reach; name it with --head HOST"
        )
    port, run_id = cluster.port or DEFAULT_PORT, prepared.run.path.name

    def line(*, is_head: bool) -> str:
        local = address if is_head else None
        rendezvous = rendezvous_options(address, port, run_id, is_host=is_head, address=local)
        words = node_command(cluster, prepared.request, rendezvous)
        return f"cd {quote(str(Path.cwd()))} && {shell_line(words, cluster.environment)}"

    lines = [f"# on {address}, the head", line(is_head=True)]
    if cluster.num_nodes > 1:
        lines += [f"# on each of the other {cluster.num_nodes - 1} nodes", line(is_head=False)]
    return "\n".join([*lines, f"# how it ended: sft-train status {quote(str(prepared.run.path))}"])


def launch_by_ssh(request: LaunchRequest, path: Path) -> str:
    """Return the ssh commands for the hosts of a DeepSpeed hostfile; with --submit run them and
    return the path of the model.

    Raises the SftError that ended the run.
    """
    hosts = read_hostfile(path)
    for name, value, in_file in (
        ("--nodes", request.num_nodes, len(hosts.names)),
        ("--gpus-per-node", request.gpus_per_node, hosts.slots),
    ):
        if value not in (None, in_file):
            raise ConfigError(
                f"{name} {value}, but {path} has {in_file}; leave the option out, or change the"
                " file"
            )
    cluster, prepared = _check(request, num_nodes=len(hosts.names), gpus_per_node=hosts.slots)
    if prepared.is_complete:
        return _nothing_to_do(prepared)
    commands = ssh.ssh_commands(cluster, prepared, hosts)
    if not request.submit:
        return "\n".join(shell_line(command) for command in commands)
    ssh.run_on_hosts(commands, prepared, hosts)
    return str(prepared.run.model)


def suggested_command(request: TrainRequest, *, num_nodes: int, gpus_per_node: int) -> str:
    """Return the line of shell that a person would type to train `request` on such machines."""
    words = request_arguments(request)
    if num_nodes == 1:
        return shell_line(["sft-train", *words, "--nproc-per-node", str(gpus_per_node)])
    shape = ["--nodes", str(num_nodes), "--gpus-per-node", str(gpus_per_node)]
    return shell_line(["sft-train", "launch", *shape, "--slurm", "--submit", "--", *words])


def _check(
    request: LaunchRequest, *, num_nodes: int | None = None, gpus_per_node: int | None = None
) -> tuple[Cluster, Prepared]:
    """Return the cluster and the run, both checked; no torch, since the GPUs are elsewhere."""
    nodes, gpus = num_nodes or request.num_nodes, gpus_per_node or request.gpus_per_node
    if nodes is None or gpus is None:
        raise ConfigError("the size of the cluster is missing: give --nodes and --gpus-per-node")
    cluster = Cluster(
        num_nodes=nodes,
        gpus_per_node=gpus,
        max_restarts=request.max_restarts,
        seconds_to_save=request.seconds_to_save,
        port=request.port,
        environment=request.environment,
    )
    if request.train.resume not in ("auto", "never"):
        raise ConfigError(
            f"--resume {request.train.resume}: every restart on the cluster would go back there;"
            " remove the checkpoints after it, or start another run with --output"
        )
    prepared = prepare(request.train)
    # `--resume never` was obeyed by this check. A restart of the same job has to resume.
    prepared = replace(prepared, request=replace(request.train, resume="auto"))
    if not prepared.is_complete:
        check_ranks(prepared, cluster.world_size)
        check_tokenizer(prepared.shard_set, prepared.recipe.model)
    return cluster, prepared


def _nothing_to_do(prepared: Prepared) -> str:
    push = ""
    if prepared.request.push_to_hub or prepared.request.push_checkpoints:
        push = f"; push it with sft-train push [--checkpoints] {prepared.run.path} USER/NAME"
    return f"{prepared.run.path} is complete: the model is in {prepared.run.model}{push}"
