"""Checkpoints on disk: which are whole, which is the best, and what is wrong with a damaged one."""

import json
import random
from pathlib import Path

import pytest

from shared.errors import ArtifactError, ChecksumError, IncompleteArtifactError
from shared.hashing import sha256_file
from train.run.checkpoint_layout import (
    FORMAT_VERSION,
    STATE_NAME,
    best_checkpoint,
    check_digest,
    list_checkpoints,
    read_state_file,
    recovery_hint,
    same_layout,
)


def make_checkpoint(folder: Path, step: int, *, eval_loss: float | None = None) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    state = {"format_version": FORMAT_VERSION, "step": step, "eval_loss": eval_loss}
    (path / STATE_NAME).write_text(json.dumps(state))
    return path


def test_only_directories_that_were_renamed_into_place_count_oldest_first(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []
    paths = [make_checkpoint(tmp_path, step) for step in (10, 9, 100_000_000)]
    for name in (".tmp-step-00000011", "step-00000012-old", "step-", "best", "superseded"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == [paths[1], paths[0], paths[2]]


@pytest.mark.parametrize("seed", range(10))
def test_the_best_one_has_the_lowest_loss_and_is_the_oldest_of_equals(
    seed: int, tmp_path: Path
) -> None:
    """One that was not evaluated, or that is damaged, is never the best."""
    draw = random.Random(seed)
    losses = [draw.choice([None, 1.0, 1.5, 2.0]) for _ in range(5)]
    paths = [
        make_checkpoint(tmp_path, step, eval_loss=loss) for step, loss in enumerate(losses, start=1)
    ]
    damaged = draw.randrange(5)
    (paths[damaged] / STATE_NAME).write_text("{")
    candidates = [
        (loss, path)
        for number, (loss, path) in enumerate(zip(losses, paths, strict=True))
        if loss is not None and number != damaged
    ]
    assert best_checkpoint(tmp_path) == (min(candidates)[1] if candidates else None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "format_version is None"),
        ('{"format_version": 1}', f"format_version is 1; this program reads {FORMAT_VERSION}"),
    ],
)
def test_a_state_that_cannot_be_used_names_the_checkpoint_before_it(
    content: str, message: str, tmp_path: Path
) -> None:
    older, path = make_checkpoint(tmp_path, 3), make_checkpoint(tmp_path, 5)
    make_checkpoint(tmp_path, 7)
    (path / STATE_NAME).write_text(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_state_file(path)
    assert str(caught.value).endswith(f"resume from the one before it with --resume {older}")
    assert recovery_hint(older) == f"; remove {older} to start again"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a run; give a checkpoint, such as .*step-00000003"),
        ("checkpoints/best", "no checkpoint of this run was evaluated; give a checkpoint, such as"),
        (
            "checkpoints/step-00000004",
            r"does not exist; give a checkpoint, such as .*step-00000003",
        ),
        ("checkpoints/step-00000005", r"is not a whole checkpoint: it has no state\.json; resume"),
        ("checkpoints/step-00000003/state.json", "is no checkpoint; give a checkpoint: RUN/check"),
        ("elsewhere/step-00000003", "does not exist; give a checkpoint: RUN/checkpoints/step-N"),
    ],
)
def test_a_path_that_is_no_checkpoint_is_explained(name: str, message: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoints", 3)
    if name.endswith("5"):
        (tmp_path / name).mkdir()
    with pytest.raises(IncompleteArtifactError, match=message):
        read_state_file(tmp_path / name)


def test_a_file_that_was_removed_cut_or_changed_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    file = path / "weights.pt"
    file.write_bytes(bytes(range(200)))
    entry = {"bytes": 200, "sha256": sha256_file(file)}
    check_digest(path, "weights.pt", entry)
    file.write_bytes(bytes(range(1, 201)))
    with pytest.raises(ChecksumError, match=r"weights\.pt: its bytes have changed"):
        check_digest(path, "weights.pt", entry)
    file.write_bytes(bytes(range(199)))
    with pytest.raises(IncompleteArtifactError, match=r"has 199 bytes; state\.json expects 200"):
        check_digest(path, "weights.pt", entry)
    file.unlink()
    with pytest.raises(IncompleteArtifactError, match=r"weights\.pt is missing"):
        check_digest(path, "weights.pt", entry)


def test_a_layout_is_the_number_of_ranks_and_the_zero_stage() -> None:
    state = {"world_size": 2, "zero_stage": 3}
    assert same_layout(state, world_size=2, zero_stage=3)
    assert not same_layout(state, world_size=1, zero_stage=3)
    assert not same_layout(state, world_size=2, zero_stage=2)
