"""How many ranks start on this machine, and where they may not start."""

import os

import pytest

from shared.errors import ConfigError
from train.engine.launcher_env import LauncherEnv, launched, read_launcher_env, single_process_env
from train.launch.local import ranks_on, run_or_launch


def test_one_process_is_rank_0_of_1_and_cleans_up() -> None:
    assert not launched()
    with single_process_env():
        assert launched()
        assert read_launcher_env() == LauncherEnv(rank=0, local_rank=0, world_size=1)
    assert not launched()


def test_ranks_may_not_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    with single_process_env(), pytest.raises(ConfigError, match="is one already"):
        run_or_launch(None, 2)  # type: ignore[arg-type]


def test_there_are_no_more_ranks_than_gpus() -> None:
    assert [ranks_on(8, None), ranks_on(0, None), ranks_on(8, 4), ranks_on(0, 2)] == [8, 1, 4, 2]
    too_many = "--nproc-per-node 9, but 8 GPUs are visible; give at most 8"
    with pytest.raises(ConfigError, match=too_many):
        ranks_on(8, 9)


def test_a_cpu_gets_a_few_ranks_for_each_core() -> None:
    most = 4 * (os.cpu_count() or 1)
    assert ranks_on(0, most) == most
    with pytest.raises(ConfigError, match=f"without a GPU; give at most {most}, 4 per CPU core"):
        ranks_on(0, most + 1)
