"""The launcher hands its whole request on, by a command that runs no file of the working
directory."""

import dataclasses
from pathlib import Path

import pytest

from shared.errors import ArtifactError, ConfigError, SftError
from train.cli.main import cli
from train.engine.launcher_env import LauncherEnv, launched, read_launcher_env, single_process_env
from train.launch.local import ranks_on
from train.launch.torchrun import standalone_command
from train.run.command_line import rank_arguments
from train.run.prepare import TrainRequest

FULL = TrainRequest(
    shards=Path("data_cache/x"),
    recipe="tulu3-8b",
    model="some/model",
    output=Path("runs/y"),
    settings=("optim.learning_rate=1e-5", "log.wandb=offline"),
    max_steps=7,
    stop_after=3,
    resume="never",
    eval_shards=Path("held-out"),
    push_to_hub="user/model",
    push_checkpoints="user/checkpoints",
    trust_checkpoint=True,
    verbosity=2,
)


@pytest.mark.parametrize(
    "request_", [FULL, TrainRequest(shards=Path("s")), dataclasses.replace(FULL, verbosity=-1)]
)
def test_a_rank_gets_the_request_of_the_launcher(request_: TrainRequest) -> None:
    context = cli.make_context("sft-train", rank_arguments(request_))
    given = dict(context.params)
    assert given.pop("under_launcher") is True
    assert given.pop("nproc_per_node") is None
    quiet, verbose = given.pop("quiet"), given.pop("verbose")
    assert TrainRequest(**given, verbosity=-1 if quiet else verbose) == request_


def test_torchrun_forwards_signals_waits_for_a_save_and_imports_nothing_from_here() -> None:
    command = standalone_command(FULL, 4)
    assert command[1:4] == ["-P", "-m", "train.launch.elastic"]
    assert command[command.index("--nproc-per-node") + 1] == "4"
    assert "SIGUSR1" in command[command.index("--signals-to-handle") + 1].split(",")
    assert int(command[command.index("--shutdown-timeout") + 1]) >= 300
    script = command[command.index("--no-python") + 1]
    assert Path(script).name == "sft-train"
    assert Path(script).is_absolute()


def test_one_process_describes_itself_and_cleans_up() -> None:
    assert not launched()
    with single_process_env():
        assert launched()
        assert read_launcher_env() == LauncherEnv(rank=0, local_rank=0, world_size=1)
    assert not launched()


def test_ranks_may_not_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.launch.local import run_or_launch

    with single_process_env(), pytest.raises(ConfigError, match="is one already"):
        run_or_launch(None, 2)  # type: ignore[arg-type]


def test_every_exit_code_of_a_rank_becomes_its_error_again() -> None:
    from train.run.read_status import _ERRORS

    assert _ERRORS[5] is ArtifactError
    assert sorted(code for code in _ERRORS if isinstance(code, int)) == [3, 4, 5, 6, 75]
    assert all(issubclass(error, SftError) for error in _ERRORS.values())


def test_there_are_no_more_ranks_than_gpus() -> None:
    assert [ranks_on(8, None), ranks_on(0, None), ranks_on(8, 4), ranks_on(0, 2)] == [8, 1, 4, 2]
    with pytest.raises(
        ConfigError, match="--nproc-per-node 9, but 8 GPUs are visible; give at most 8"
    ):
        ranks_on(8, 9)
