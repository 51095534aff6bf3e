"""Fixtures of all tests; and tests may import what lies in builders/ and doubles/ (`shard_sets`):
pytest does not add folders to the path in importlib mode."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from prep_processes import ForkedPrep

# One thread here and in every process that a test starts: more threads would add in another order
# when the machine is busy, and some tests compare runs bit by bit. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

for _folder in ("builders", "doubles"):
    sys.path.insert(0, str(Path(__file__).with_name(_folder)))


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[ForkedPrep]":
    """sft-prep forked from a process that has done its imports, which saves a second per run."""
    from prep_processes import ForkedPrep

    server = ForkedPrep(tmp_path_factory.mktemp("forked"))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def heard() -> None:
    """Let pytest see our log lines: a command that ran in this process has turned that off."""
    for name in ("prep", "train", "shared"):
        logging.getLogger(name).propagate = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch finds none"))


@pytest.fixture(scope="session")
def second_device(request: pytest.FixtureRequest) -> Path:
    """The compiled module of tests/second_device, built once for all workers and kept in pytest's
    cache."""
    sys.path.insert(0, str(Path(__file__).with_name("second_device")))
    from device_build import build, why_not

    if reason := why_not():
        pytest.skip(reason)
    return build(request.config.cache.mkdir("second_device"))
