"""The batch script is the golden one, survives any value, and, run by bash, saves, requeues and
resumes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_doubles import SBATCH, SCONTROL, SRUN, write_programs
from repository import TESTS
from train_runs import RECIPE, launch_here, losses, status, train_here, write_inputs

from train.run.command_line import console_script

GOLDEN = TESTS / "golden" / "slurm_script.sh"
# Each rank draws its own dropout, so that other numbers of ranks would have other losses.
SMOOTH = RECIPE.replace("attention_dropout = 0.1\n", "")


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)
    return write_inputs(tmp_path, recipe=SMOOTH)


def script(*options: object, train: tuple[object, ...] = (), nodes: int = 2) -> str:
    result = launch_here("--slurm", "--nodes", nodes, "--gpus-per-node", 1, *options, train=train)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(code: int, message: str, *options: object, train: tuple[object, ...] = ()) -> None:
    result = launch_here("--slurm", "--nodes", 2, "--gpus-per-node", 1, *options, train=train)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not result.stdout


def check_syntax(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_is_the_golden_one(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("--partition", "gpu", "--account", "lab", "--time", "1-00:00:00")
    options += ("--sbatch", "qos=high", "--env", "NCCL_SOCKET_IFNAME=eth0")
    text = script(*options, train=("--set", "run.seed=3"))
    check_syntax(text)
    for path, golden_path in (
        (str(tmp_path), "/home/user"),
        (sys.executable, "/opt/venv/bin/python"),
        (str(console_script()), "/opt/venv/bin/sft-train"),
    ):
        text = text.replace(path, golden_path)
    assert text == GOLDEN.read_text(encoding="utf-8")


NASTY = 'it\'s $(touch x) `touch x` "q" \\ ; & * #\n{x} %s'


def test_no_value_of_a_user_is_read_by_the_shell(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / NASTY
    folder.mkdir()
    os.chdir(folder)
    write_inputs(folder)
    env = write_programs(tmp_path / "bin", srun="import sys\nprint(sys.argv)", scontrol=SCONTROL)
    text = script("--env", f"A={NASTY}", train=("--set", f"log.wandb_name={NASTY}"))
    check_syntax(text)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_NUM_NODES": "2"}
    bash = ["bash", "-c", text.replace("--wait 60", "--wait 0")]
    done = subprocess.run(bash, capture_output=True, text=True, env={**env, **job}, cwd="/")
    words_of_srun = next(line for line in done.stdout.splitlines() if line.startswith("["))
    # torchrun takes $$ for $
    assert repr(f"log.wandb_name={NASTY.replace('$', '$$')}") in words_of_srun
    assert repr("a:20007") in words_of_srun
    assert not list(tmp_path.rglob("x"))
    # No ranks were started, so there is no status.json.
    assert done.returncode == 5
    assert "has no status.json" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--time", "600:00x"), "--time '600:00x'; expected minutes, HH:MM:SS or D-HH:MM:SS"),
        (("--time", "10"), "--time 10 is 600 s, and the ranks have to stop 600 s before its end"),
        (("--time", "0:10:00"), "is 600 s"),
        (("--time", "0-0:10"), "is 600 s"),
        (("--job-name", "a b"), "--job-name 'a b': expected letters, digits"),
        (("--partition", "x\n#SBATCH --wrap=y"), "--partition"),
        (("--sbatch", "nodes=4"), "--sbatch nodes=4: expected an option other than nodes"),
        (("--sbatch", "--qos=x"), "without dashes"),
        (("--env", "A B=c"), "--env A B=c: expected NAME=VALUE"),
    ],
)
def test_a_bad_option_is_refused(
    inputs: tuple[Path, Path], options: tuple[str, ...], message: str
) -> None:
    refused(3, message, *options)


@pytest.mark.parametrize("time", ["11", "10:01", "0:10:01", "0-1", "0-00:11", "1-00:00:00"])
def test_every_form_of_a_time_limit_is_read(inputs: tuple[Path, Path], time: str) -> None:
    assert f"#SBATCH --time={time}\n" in script("--time", time)


def test_the_run_is_checked_as_its_start_would_check_it(inputs: tuple[Path, Path]) -> None:
    refused(3, "do not divide over 6 ranks", "--nodes", 3, "--gpus-per-node", 2)
    refused(3, "unknown key 'optim.nonsense'", train=("--set", "optim.nonsense=1"))
    refused(5, "nowhere", train=("--shards", "nowhere"))
    resume = ("--resume", "run/checkpoints/step-00000001")
    refused(3, "every restart on the cluster would go back there", train=resume)
    assert not Path("run").exists()


def test_what_only_launch_decides_is_refused_among_the_options_of_a_rank(
    inputs: tuple[Path, Path],
) -> None:
    refused(2, "--gpus-per-node instead", train=("--nproc-per-node", 2))
    refused(2, "unexpected extra argument", train=("plan",))
    result = launch_here("--nodes", 2, "--gpus-per-node", 1)
    assert result.exit_code == 2
    assert "Give one of --slurm, --torchrun and --deepspeed-hostfile" in result.stderr


def test_a_run_that_is_to_stop_early_is_not_requeued(inputs: tuple[Path, Path]) -> None:
    assert "scontrol requeue" in script()
    assert "scontrol requeue" not in script(train=("--stop-after", 3))


def test_submit_hands_the_printed_script_to_sbatch(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = write_programs(tmp_path / "bin", sbatch=SBATCH)
    monkeypatch.setenv("PATH", env["PATH"])
    monkeypatch.setenv("SUBMITTED", str(tmp_path / "job.sh"))
    printed = script()
    assert script("--submit") == "Submitted batch job 4711\n"
    assert (tmp_path / "job.sh").read_text().strip() == printed.strip()


def test_submit_without_sbatch_or_with_one_that_refuses(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    refused(6, "no command sbatch", "--submit")
    write_programs(
        tmp_path / "bin", sbatch="import sys\nsys.exit('sbatch: error: no such partition')"
    )
    refused(6, "sbatch refused the job: sbatch: error: no such partition", "--submit")


class Job:
    """A started batch script, two nodes of one rank on the loopback interface."""

    def __init__(self, folder: Path, text: str, restarts: int) -> None:
        env = write_programs(folder / "bin", srun=SRUN, scontrol=SCONTROL)
        env |= {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": str(restarts)}
        env |= {"REQUEUED": str(folder / "requeued")}
        env |= {"SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.2", "SLURM_JOB_NUM_NODES": "2"}
        (folder / "job.sh").write_text(text)
        self.process = subprocess.Popen(
            ["bash", str(folder / "job.sh")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=env, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_exception: object) -> None:
        # Ranks die with their torchrun, which is in this group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, folder: Path) -> tuple[int, str]:
        assert self.process.stdout is not None
        output = self.process.stdout.read()
        code = self.process.wait(timeout=100)
        logs = "\n".join(path.read_text() for path in sorted(folder.rglob("node-*.log")))
        return code, f"{output}\n{logs}"


@pytest.mark.slow
def test_a_signal_before_the_time_limit_saves_and_requeues_and_the_next_start_reaches_the_end(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    text = script("--env", "GLOO_SOCKET_IFNAME=lo", train=("--set", "schedule.epochs=30"))
    run = tmp_path / "run"
    with Job(tmp_path, text, restarts=0) as job:
        deadline = time.monotonic() + 100
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
            assert job.process.poll() is None, job.end(tmp_path)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.process.send_signal(signal.SIGUSR1)
        code, output = job.end(tmp_path)
    assert code == 75, output
    assert status(run)["state"] == "stopped", output
    assert (tmp_path / "requeued").read_text() == "4711\n"
    stopped_at = losses(run)[-1][0]
    assert stopped_at < 75

    with Job(tmp_path, text, restarts=1) as job:
        code, output = job.end(tmp_path)
    assert code == 0, output
    assert f"resuming after step {stopped_at}" in output
    assert (tmp_path / "requeued").read_text() == "4711\n"
    alone = tmp_path / "alone"
    call = ("--shards", "set", "--recipe", "tiny.toml", "--output", alone)
    assert train_here(*call, "--set", "schedule.epochs=30").exit_code == 0
    assert [step for step, _ in losses(run)] == list(range(1, 76))
    expected = [loss for _, loss in losses(alone)]
    assert [loss for _, loss in losses(run)] == pytest.approx(expected, abs=2e-4)
