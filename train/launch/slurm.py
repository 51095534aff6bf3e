"""The batch script of a run on SLURM: one torchrun per node, a save before the time limit, and the
job back in the queue.

The script relies on what SLURM does: `--signal=B:` reaches the batch shell alone, and its trap runs
only while the shell waits for a background process; srun passes SIGUSR1 on to its tasks but answers
SIGTERM by killing them; a requeued job runs the same script again under the same job id.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError, PrerequisiteError
from train.launch.torchrun import Cluster, ShellWord, node_command, quote, shell_lines
from train.run.command_line import console_script
from train.run.prepare import Prepared

_PLAIN = re.compile(r"[A-Za-z0-9_.,:@%/+=*\[\]-]+")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_OURS = ("nodes", "ntasks-per-node", "gpus-per-node", "signal", "requeue", "open-mode")

_SCRIPT = r"""#!/bin/bash
{directives}

# One torchrun for each node. All nodes see this directory, the shard set, the run directory and
# this Python at the same paths. SLURM signals this script {seconds} s before the time limit; it
# passes that on, the ranks finish their step and save, and the job goes back into the queue, where
# the next start goes on. scancel ends it for good.
set -uo pipefail
cd -- {folder} || exit 1
{exports}
run={run}
logs="$run/logs/$SLURM_JOB_ID"
mkdir -p -- "$logs" || exit 1
: > "$logs/started"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port={port}

ranks=
cancelled=
pass_on() {{ [ -z "$ranks" ] || kill -USR1 "$ranks" 2> /dev/null; }}
trap pass_on USR1
trap 'cancelled=yes; pass_on' TERM

# each task learns from SLURM which node it is: the first one hosts the rendezvous
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    {srun_cpus} --wait={seconds} --open-mode=append --output="$logs/node-%n.log" \
    bash -c '
        exec "${{@:1:4}}" --rdzv-conf "is_host=$((SLURM_NODEID == 0))" \
            --local-addr "$SLURMD_NODENAME" "${{@:5}}"
    ' node {command} &
ranks=$!
echo "started on $SLURM_JOB_NODELIST, start ${{SLURM_RESTART_COUNT:-0}}; logs: $logs/node-*.log"
while true; do
    wait "$ranks"  # a trapped signal ends the wait, not the ranks
    kill -0 "$ranks" 2> /dev/null || break
done

{sft_train} status --changed-after "$logs/started" --wait 60 -- "$run"
outcome=$?
{requeue}exit "$outcome"
"""

_REQUEUE = """if [ "$outcome" -eq 75 ] && [ -z "$cancelled" ]; then
    scontrol requeue "$SLURM_JOB_ID" && echo "job $SLURM_JOB_ID is in the queue again"
fi
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmOptions:
    """The options of sbatch beyond the shape of the job."""

    job_name: str | None = None
    """Default: the name of the run directory."""
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    cpus_per_node: int | None = None
    """None: the job gets whole nodes (--exclusive)."""
    others: tuple[str, ...] = ()
    """NAME=VALUE or NAME: any other option of sbatch, without its dashes."""


def batch_script(cluster: Cluster, prepared: Prepared, options: SlurmOptions) -> str:
    """Return the script for sbatch. Raises ConfigError for a value that sbatch could misread."""
    rendezvous = [
        *("--rdzv-endpoint", ShellWord('"$head:$port"')),
        *("--rdzv-id", ShellWord('"$SLURM_JOB_ID"')),
    ]
    variables = [setting.partition("=") for setting in cluster.environment]
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(cluster, prepared, options)),
        seconds=cluster.seconds_to_save,
        folder=quote(str(Path.cwd())),
        exports="".join(f"export {name}={quote(value)}\n" for name, _, value in variables),
        run=quote(str(prepared.run.path)),
        # Two jobs may share a node: the port depends on the job, below those that Linux hands out.
        port=cluster.port if cluster.port is not None else "$((20000 + SLURM_JOB_ID % 10000))",
        srun_cpus=(
            "--cpu-bind=none"
            if options.cpus_per_node is None
            else f"--cpus-per-task={options.cpus_per_node}"
        ),
        command=shell_lines(node_command(cluster, prepared.request, rendezvous)),
        sft_train=quote(str(console_script())),
        # With --stop-after the job is to end there.
        requeue=_REQUEUE if prepared.request.stop_after is None else "",
    )


def _directives(cluster: Cluster, prepared: Prepared, options: SlurmOptions) -> list[str]:
    """Return the options for sbatch, which reads them without a shell and knows no quoting."""
    _check_time(options.time, cluster.seconds_to_save)
    named = {
        "--job-name": options.job_name or re.sub(r"[^A-Za-z0-9_.-]", "-", prepared.run.path.name),
        "--nodes": str(cluster.num_nodes),
        "--ntasks-per-node": "1",
        "--gpus-per-node": str(cluster.gpus_per_node),
        "--partition": options.partition,
        "--account": options.account,
        "--time": options.time,
        "--signal": f"B:USR1@{cluster.seconds_to_save}",
        "--open-mode": "append",
    }
    if options.cpus_per_node is not None:
        named["--cpus-per-task"] = str(options.cpus_per_node)
    lines = [f"{name}={_plain(name, value)}" for name, value in named.items() if value is not None]
    lines += ["--requeue"] + ["--exclusive"] * (options.cpus_per_node is None)
    for other in options.others:
        name = other.partition("=")[0]
        if name in _OURS or name.startswith("-"):
            raise ConfigError(
                f"--sbatch {other}: expected an option other than {', '.join(_OURS)}, without"
                " dashes"
            )
        lines.append(f"--{_plain('--sbatch', other)}")
    return lines


def _plain(name: str, value: str) -> str:
    if not _PLAIN.fullmatch(value):
        raise ConfigError(
            f"{name} {value!r}: expected letters, digits and _.,:@%/+=*[]- only; sbatch knows no"
            " quoting"
        )
    return value


def _check_time(time: str | None, seconds_to_save: int) -> None:
    """Raise ConfigError unless the time limit, in any of SLURM's forms, leaves time to train."""
    if time is None:
        return
    match = _TIME.fullmatch(time)
    if match is None:
        raise ConfigError(f"--time {time!r}; expected minutes, HH:MM:SS or D-HH:MM:SS")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        # D-HH, D-HH:MM or D-HH:MM:SS
        hours, minutes, seconds = [*parts, 0, 0][:3]
        hours += 24 * int(match["days"])
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        # MM or MM:SS
        hours, minutes, seconds = 0, *[*parts, 0][:2]
    limit = (hours * 60 + minutes) * 60 + seconds
    if limit <= seconds_to_save:
        raise ConfigError(
            f"--time {time} is {limit} s, and the ranks have to stop {seconds_to_save} s before its"
            " end (--seconds-to-save); ask for more time, or leave less for the save"
        )


def submit(script: str) -> str:
    """Hand `script` to sbatch and return its answer.

    Raises PrerequisiteError if there is no sbatch, or if it refuses the job.
    """
    try:
        job = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as exc:
        raise PrerequisiteError(
            "no command sbatch; run this on a login node of the cluster, or leave --submit out"
        ) from exc
    if job.returncode != 0:
        raise PrerequisiteError(f"sbatch refused the job: {job.stderr.strip()}")
    return job.stdout.strip()
