"""A Dask cluster makes the same set as local processes; where there is none, one clear error."""

from dataclasses import replace
from pathlib import Path

import pytest
from prep_builds import build_set, chat, mixture_of, plan_of, small_tokenizer, write_rows

from prep.build.build import build
from shared.errors import PrerequisiteError

distributed = pytest.importorskip("distributed", reason="Dask is an optional extra: cluster")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_of_two_workers_makes_the_same_set(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path / "small")
    rows = [
        write_rows(tmp_path / f"{name}.jsonl", [chat("Hi", f"{name} {i}") for i in range(5000)])
        for name in "ab"
    ]
    tables = mixture_of(rows, tokenizer)
    local = build_set(tables, tmp_path / "local", store=tmp_path / "s1").manifest
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        plan = plan_of(tables, tmp_path / "cluster", store=tmp_path / "s2")
        made = build(replace(plan, scheduler=cluster.scheduler_address), rebuild=False)
    assert made == local


def test_no_scheduler_at_the_address_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.store.executors._CONNECT_SECONDS", 0.5)
    tables = mixture_of(
        [write_rows(tmp_path / "a.jsonl", [chat("Hi", "Yo")])], small_tokenizer(tmp_path / "small")
    )
    with pytest.raises(PrerequisiteError, match=r"tcp://127\.0\.0\.1:9"):
        build(
            replace(plan_of(tables, tmp_path / "out"), scheduler="tcp://127.0.0.1:9"), rebuild=False
        )
