"""Messages between ranks: every rank gets the answer that its docstring promises."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.engine.launcher_env import launched
from train.engine.process_group import (
    Ranks,
    any_rank,
    barrier,
    broadcast_from_main,
    gather_to_main,
    sum_over_ranks,
)

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), control_group=None)


def test_one_rank_answers_itself_without_a_group() -> None:
    assert not launched()
    assert ALONE.is_main
    assert any_rank(True, ALONE)
    assert not any_rank(False, ALONE)
    assert gather_to_main("a", ALONE) == ["a"]
    assert broadcast_from_main("a", ALONE) == "a"
    values = torch.tensor([2.0])
    assert sum_over_ranks(values, ALONE).tolist() == [2.0]
    barrier(ALONE)


PROGRAM = """
import json, os, sys, time
from pathlib import Path
import torch
from train.engine.process_group import (
    any_rank, barrier, broadcast_from_main, gather_to_main, process_group, sum_over_ranks,
)
folder = Path(sys.argv[1])
with process_group() as ranks:
    values = torch.tensor([1.0 + ranks.rank])
    results = {
        "any of one": any_rank(ranks.rank == 1, ranks),
        "any of none": any_rank(False, ranks),
        "gathered": gather_to_main({"rank": ranks.rank}, ranks),
        "broadcast": broadcast_from_main(f"from {ranks.rank}", ranks),
        "sum": sum_over_ranks(values, ranks).tolist(),
        "in place": values.tolist(),
    }
    if not ranks.is_main:
        (folder / f"{ranks.rank}.ready").touch()
    elif ranks.is_main:
        time.sleep(0.2)
        (folder / "0.ready").touch()
    barrier(ranks)
    results["all were ready"] = len(list(folder.glob("*.ready"))) == ranks.world_size
    (folder / f"{ranks.rank}.json").write_text(json.dumps(results))
assert not torch.distributed.is_initialized()
"""


@pytest.mark.slow
def test_three_ranks_answer_as_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], errors
    for rank in range(3):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert results == {
            "any of one": True,
            "any of none": False,
            "gathered": [{"rank": number} for number in range(3)] if rank == 0 else [],
            "broadcast": "from 0",
            "sum": [6.0],
            "in place": [6.0],
            "all were ready": True,
        }
