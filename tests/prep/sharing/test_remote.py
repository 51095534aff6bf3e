"""What a repository argument means, and a directory as a remote: whole or absent."""

import os
from pathlib import Path

import pytest
from hub_state import Hub
from pushed_sets import (
    FULL,
    REPO,
    FullDisk,
    content,
    done,
    refused,
    run,
)

from prep.sharing.remote import parse_repo
from shared.errors import ConfigError


def test_what_a_repository_argument_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "user" / "here").mkdir(parents=True)
    assert (
        parse_repo("user/name")
        == parse_repo("hf://user/name")
        == parse_repo("hf://datasets/user/name")
        == "user/name"
    )
    assert parse_repo("hf://user/here") == "user/here"
    assert parse_repo("user/here") == Path("user/here")
    assert parse_repo("~/there") == tmp_path / "there"
    for path in ("./new", "../new", "/new", "."):
        assert parse_repo(path) == Path(path)
    for wrong in ("hf://user", "new", "user/name/more", "user/../name", ""):
        with pytest.raises(ConfigError, match="neither"):
            parse_repo(wrong)


def test_a_directory_holds_what_a_repository_would(hub: Hub, shards: Path, tmp_path: Path) -> None:
    done("push", shards, REPO)
    done("push", shards, tmp_path / "pushed")
    there = {
        path: blob.data
        for path, blob in hub.repositories[REPO].files().items()
        if path != ".gitattributes"
    }
    assert content(tmp_path / "pushed") == there
    done("pull", tmp_path / "pushed", tmp_path / "back")
    assert content(tmp_path / "back") == content(shards)


@pytest.mark.parametrize("files", [0, 9, 21, 25])
def test_a_full_disk_leaves_no_half_set(
    files: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "replace", FullDisk(os.replace, after=files, error=FULL))
        line = refused(5, "push", shards, tmp_path / "pushed")
    assert "No space left on device; what was written is removed again" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [".pushed.lock", "tiny"]
    done("push", shards, tmp_path / "pushed")


def test_a_stopped_push_to_a_directory_resumes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr(os, "replace", FullDisk(os.replace, after=12, error=KeyboardInterrupt()))
        assert run("push", shards, tmp_path / "pushed").exit_code == 130
    assert not (tmp_path / "pushed").exists()
    column = Path("shards") / "00000" / "tokens.npy.zst"
    inode = (tmp_path / ".tmp-pushed-push" / column).stat().st_ino
    done("push", shards, tmp_path / "pushed")
    assert (tmp_path / "pushed" / column).stat().st_ino == inode
    done("pull", tmp_path / "pushed", tmp_path / "back")
    assert content(tmp_path / "back") == content(shards)
