"""The demo's columns and its first losses are the recorded ones, which a refactoring may not change
(tests/builders/golden_demo.py)."""

from pathlib import Path

import pytest
from golden_demo import COLUMNS, RANKS, STEPS, build, columns_of, recorded_losses, train

from shared.hashing import sha256_file

pytestmark = pytest.mark.slow

OTHER_CPU = 2e-5
"""Relative. Other vector units and libraries round sums differently, by 1e-7 in the first step; the
difference grows over twenty steps."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "demo"
    build(path)
    return path


def test_the_columns_are_the_recorded_ones(shards: Path) -> None:
    assert columns_of(shards) == COLUMNS.read_text()
    for line in COLUMNS.read_text().splitlines():
        digest, name = line.split()
        assert sha256_file(shards / name) == digest


@pytest.mark.parametrize("ranks", RANKS)
def test_the_losses_are_the_recorded_ones(ranks: int, shards: Path, tmp_path: Path) -> None:
    curve, expected = train(shards, tmp_path / "run", ranks), recorded_losses()[ranks]
    assert len(curve) == len(expected) == STEPS
    for step, (values, recorded) in enumerate(zip(curve, expected, strict=True), 1):
        loss, norm = values
        assert loss == pytest.approx(recorded[0], rel=OTHER_CPU), f"step {step}"
        assert norm == pytest.approx(recorded[1], rel=10 * OTHER_CPU), f"step {step}"


def test_one_and_two_ranks_are_one_training() -> None:
    one, two = (recorded_losses()[ranks] for ranks in RANKS)
    assert [loss for loss, _ in one] == pytest.approx([loss for loss, _ in two], rel=OTHER_CPU)
