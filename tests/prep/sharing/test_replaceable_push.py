"""A push replaces what an earlier push put there, and deletes nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pushed_sets import (
    content,
    done,
    make_set,
    refused,
)

from prep.sharing import replaceable_push


def _notes(place: Path) -> None:
    (place / "notes.txt").write_text("mine")


def _notes_among_the_shards(place: Path) -> None:
    (place / "shards" / "00000" / "notes.txt").write_text("mine")


def _an_edited_card(place: Path) -> None:
    (place / "README.md").write_text("what I found out about this set")


def _a_directory(place: Path) -> None:
    (place / "plots").mkdir()


def _a_linked_column(place: Path) -> None:
    column = place / "shards" / "00000" / "tokens.npy.zst"
    column.rename(place.with_name("kept.zst"))
    column.symlink_to(place.with_name("kept.zst"))


@pytest.mark.parametrize(
    "add", [_notes, _notes_among_the_shards, _an_edited_card, _a_directory, _a_linked_column]
)  # fmt: skip
@pytest.mark.parametrize("another", [True, False])
def test_a_push_to_a_directory_deletes_nothing_that_no_push_put_there(
    add: Callable[[Path], None], another: bool, shards: Path, tmp_path: Path
) -> None:
    place = tmp_path / "pushed"
    done("push", shards, place)
    add(place)
    if another:
        shards = make_set(tmp_path / "other", seed=1)
    else:  # a damaged place of the same set is filled again
        (place / "shards" / "00001" / "kind.npy.zst").unlink()
    before = sorted(place.rglob("*")), content(place)
    assert "holds files that no push put there: " in refused(5, "push", "--replace", shards, place)
    assert (sorted(place.rglob("*")), content(place)) == before
    assert not (tmp_path / ".tmp-pushed-push").exists()


def test_a_file_that_appears_while_a_push_is_replaced_is_kept(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("push", shards, tmp_path / "pushed")
    remove = replaceable_push.remove

    def late(old: Path) -> bool:
        _notes(old)
        return remove(old)

    monkeypatch.setattr(replaceable_push, "remove", late)
    done("push", "--replace", make_set(tmp_path / "other", seed=1), tmp_path / "pushed")
    (kept,) = tmp_path.glob(".tmp-pushed-*-old/notes.txt")
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("is_link", [True, False])
def test_what_only_has_the_name_of_an_unfinished_push_stays(
    is_link: bool, shards: Path, tmp_path: Path
) -> None:
    staging, mine = tmp_path / ".tmp-pushed-push", tmp_path / "mine"
    mine.mkdir()
    _notes(mine)
    if is_link:
        staging.symlink_to(mine)
    else:
        mine.rename(staging)
    assert "is in the way and was made by no push" in refused(
        5, "push", shards, tmp_path / "pushed"
    )
    assert (staging / "notes.txt").read_text() == "mine"
