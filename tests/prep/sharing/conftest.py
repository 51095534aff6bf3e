"""A small set, and a hub that the client in this process talks to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_state import Hub
from pushed_sets import client_of_a_hub, make_set


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_set(tmp_path / "tiny")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with client_of_a_hub(tmp_path, monkeypatch) as served:
        yield served
