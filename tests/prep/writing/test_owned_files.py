"""Files of ours are removed one by one, and only if nothing else lies beside them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from prep.writing.owned_files import remove_own, shown, sort_out

OURS = ["manifest.json", "rejects.jsonl.zst", "shards/00000/tokens.npy", "shards/00001/kind.npy"]
FOREIGN = ["notes.txt", "shards/00000/notes", "photos/cat.jpg", "eval/x/y"]
is_own = set(OURS).__contains__


def write(path: Path, names: list[str]) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)


@pytest.mark.parametrize("seed", range(20))
def test_a_directory_goes_exactly_if_everything_in_it_is_ours(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    ours = draw.sample(OURS, draw.randint(0, len(OURS)))
    foreign = draw.sample(FOREIGN, draw.choice([0, 0, 1, 2]))
    path = tmp_path / "set"
    path.mkdir()
    write(path, ours + foreign)
    own, others = sort_out(path, is_own)
    assert (sorted(own), others) == (sorted(ours), sorted(foreign))
    assert remove_own(path, is_own, last={"manifest.json"}) == (not foreign)
    left = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    assert left == (sorted(ours + foreign) if foreign else [])


def link(path: Path) -> None:
    (path / "shards" / "00000" / "tokens.npy").unlink()
    (path / "shards" / "00000" / "tokens.npy").symlink_to(path / "manifest.json")


def linked_folder(path: Path) -> None:
    (path / "shards" / "00001" / "kind.npy").unlink()
    (path / "shards" / "00001").rmdir()
    (path / "shards" / "00001").symlink_to(path / "shards" / "00000")


def empty_folder(path: Path) -> None:
    (path / "drafts").mkdir()


@pytest.mark.parametrize("change", [link, linked_folder, empty_folder])
def test_links_and_unknown_empty_folders_are_not_ours(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path / "set", OURS)
    change(tmp_path / "set")
    assert len(sort_out(tmp_path / "set", is_own)[1]) == 1
    assert not remove_own(tmp_path / "set", is_own, last=())
    assert (tmp_path / "set" / "manifest.json").exists()


def test_empty_folders_of_a_set_go_with_it(tmp_path: Path) -> None:
    for name in ("shards/00000", "eval/shards", "tokenizer"):
        (tmp_path / "set" / name).mkdir(parents=True)
    assert remove_own(tmp_path / "set", is_own, last=())
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("at", range(len(OURS)))
def test_what_a_kill_leaves_still_has_its_manifest(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "set", OURS)
    removed: list[str] = []
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if len(removed) == at:
            raise KeyboardInterrupt
        removed.append(path.name)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_own(tmp_path / "set", is_own, last={"manifest.json"})
    assert (tmp_path / "set" / "manifest.json").exists()
    monkeypatch.undo()
    assert remove_own(tmp_path / "set", is_own, last={"manifest.json"})


def test_what_is_no_directory_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "set", OURS)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert not remove_own(tmp_path / "link", is_own, last=())
    assert not remove_own(tmp_path / "set" / "manifest.json", is_own, last=())
    assert not remove_own(tmp_path / "none", is_own, last=())


def test_five_names_are_shown_and_the_rest_is_counted() -> None:
    assert shown(["a", "b"]) == "a, b"
    assert shown(list("abcde")) == "a, b, c, d, e"
    assert shown(list("abcdefg")) == "a, b, c, d, e and 2 more"
