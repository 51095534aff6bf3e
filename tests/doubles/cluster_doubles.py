"""Stand-ins for programs of a SLURM cluster: `srun`, `scontrol` and `sbatch`.

They follow the manuals in the little that we use: srun starts a task per node, passes SIGUSR1 on
and answers SIGTERM with a kill; `scontrol requeue` notes the job; sbatch keeps the script.
"""

import os
import sys
from pathlib import Path

SRUN = """
import os, signal, subprocess, sys
options, command = {}, sys.argv[1:]
while command[0].startswith("--"):
    name, _, value = command.pop(0).partition("=")
    options[name] = value
hosts = os.environ["SLURM_JOB_NODELIST"].split(",")
assert int(options["--nodes"]) == int(options["--ntasks"]) == len(hosts)
tasks = []
for number, host in enumerate(hosts):
    task = {"SLURM_NODEID": str(number), "SLURM_PROCID": str(number), "SLURMD_NODENAME": host}
    with open(options["--output"].replace("%n", str(number)), "ab") as log:
        out = {"stdout": log, "stderr": subprocess.STDOUT}
        tasks.append(subprocess.Popen(command, env={**os.environ, **task}, **out))
def tell(number):
    for task in tasks:
        if task.poll() is None:
            task.send_signal(number)
signal.signal(signal.SIGUSR1, lambda *_: tell(signal.SIGUSR1))
signal.signal(signal.SIGTERM, lambda *_: tell(signal.SIGKILL))
sys.exit(max(abs(task.wait()) for task in tasks))
"""

SCONTROL = """
import os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -n 1` may end before this does
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
elif sys.argv[1] == "requeue":
    with open(os.environ["REQUEUED"], "a") as file:
        file.write(sys.argv[2] + "\\n")
else:
    sys.exit(f"scontrol {sys.argv[1:]}")
"""

SBATCH = """
import os, sys
with open(os.environ["SUBMITTED"], "w") as file:
    file.write(sys.stdin.read())
print("Submitted batch job 4711")
"""


def write_programs(folder: Path, **programs: str) -> dict[str, str]:
    """Write Python programs by their names into `folder`; return an environment that finds them
    first."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
