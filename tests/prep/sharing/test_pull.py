"""sft-prep pull: every digest is checked, a set is whole or absent, and nothing is fetched
twice."""

import json
import shutil
from pathlib import Path

import pytest
from hub_state import Hub
from pushed_sets import (
    FULL,
    REPO,
    FullDisk,
    command,
    content,
    done,
    kill_at,
    make_set,
    refused,
)

from shared.hashing import canonical_json
from shared.shard_reader import read_manifest


def test_a_commit_can_be_pulled_after_the_set_was_replaced(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    commit = hub.repositories[REPO].branches["main"]
    done("push", "--replace", make_set(tmp_path / "other", seed=1), REPO)
    done("pull", "--revision", commit, REPO, tmp_path / "back")
    assert content(tmp_path / "back") == content(shards)


def test_pull_replaces_no_directory_but_a_shard_set(hub: Hub, shards: Path, tmp_path: Path) -> None:
    done("push", shards, REPO)
    other = make_set(tmp_path / "other", seed=1)
    line = refused(5, "pull", REPO, other)
    assert read_manifest(other).fingerprint in line
    assert read_manifest(shards).fingerprint in line
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    assert "is no shard set" in refused(5, "pull", "--replace", REPO, tmp_path / "mine")
    done("pull", "--replace", REPO, other)
    assert content(other) == content(shards)


@pytest.mark.parametrize(
    ("repo", "code", "expected"),
    [
        ("writer/none", 5, "there is no such repository"),
        ("one", 3, "neither a hub data set (user/name or hf://user/name) nor a directory"),
        ("a/b/c", 3, "write ./a/b/c for a new directory"),
        ("./nothing", 5, "holds no set that sft-prep push put there"),
    ],
)
def test_what_cannot_be_pulled_is_one_line(
    repo: str, code: int, expected: str, hub: Hub, tmp_path: Path
) -> None:
    assert expected in refused(code, "pull", repo, tmp_path / "back")


def test_a_pull_goes_to_data_cache_by_default(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done("push", shards, "./pushed")
    done("pull", "pushed")
    assert content(tmp_path / "data_cache" / "pushed") == content(shards)


@pytest.mark.parametrize("damage", ["flipped", "short", "no zstd"])
def test_bytes_that_changed_on_the_hub_are_a_checksum_error(
    damage: str, hub: Hub, shards: Path, tmp_path: Path
) -> None:
    path = "shards/00001/tokens.npy.zst"
    done("push", shards, REPO)
    good = hub.repositories[REPO].files()[path].data
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    hub.replace(
        REPO, path, {"flipped": bytes(bad), "short": good[:-9], "no zstd": b"x" * len(good)}[damage]
    )
    line = refused(5, "pull", "--workers", 1, REPO, tmp_path / "back")
    assert f"{path} arrived with" in line
    assert not (tmp_path / "back").exists()
    hub.replace(REPO, path, good)
    hub.downloads.clear()
    done("pull", REPO, tmp_path / "back")
    assert hub.downloads["shards/00000/tokens.npy.zst"] == 0
    assert content(tmp_path / "back") == content(shards)


def test_a_manifest_and_a_transfer_that_differ_are_a_checksum_error(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    transfer = json.loads(hub.repositories[REPO].files()["transfer.json"].data)
    original = canonical_json(transfer)
    transfer["columns"]["shards/00000/kind.npy"]["sha256"] = "0" * 64
    hub.replace(REPO, "transfer.json", canonical_json(transfer))
    assert "differ in shards/00000/kind.npy" in refused(5, "pull", REPO, tmp_path / "back")
    hub.replace(REPO, "transfer.json", original[:-9])
    assert "is not valid JSON" in refused(5, "pull", REPO, tmp_path / "back")
    assert "is not valid JSON" in refused(5, "push", shards, REPO)
    done("push", "--replace", shards, REPO)
    hub.replace(
        REPO,
        "manifest.json",
        hub.repositories[REPO].files()["manifest.json"].data.replace(b"tiny", b"tinx"),
    )
    assert "manifest.json has sha256" in refused(5, "pull", REPO, tmp_path / "back")


def test_of_a_damaged_set_only_the_damaged_files_are_fetched(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    done("pull", REPO, tmp_path / "back")
    hub.downloads.clear()
    assert "is up to date" in done("pull", REPO, tmp_path / "back")
    (tmp_path / "back" / "eval" / "shards" / "00000" / "kind.npy").write_bytes(b"gone")
    done("pull", REPO, tmp_path / "back")
    assert [path for path in hub.downloads if path.endswith(".zst")] == [
        "eval/shards/00000/kind.npy.zst"
    ]
    assert content(tmp_path / "back") == content(shards)


def test_a_killed_pull_fetches_only_what_has_not_arrived(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    fault = hub.fail(
        f"{hub.repositories[REPO].branches['main']}/shards/00001/tokens.npy.zst", "hold"
    )
    kill_at(fault, command(hub, tmp_path / "home", "pull", "--workers", 1, REPO, tmp_path / "back"))
    assert not (tmp_path / "back").exists()
    hub.downloads.clear()
    done("pull", REPO, tmp_path / "back")
    assert not [path for path in hub.downloads if path.startswith("shards/00000/")]
    assert hub.downloads["shards/00001/tokens.npy.zst"] == 1
    assert content(tmp_path / "back") == content(shards)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_full_disk_keeps_what_was_pulled(
    hub: Hub, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("push", shards, REPO)
    with monkeypatch.context() as full:
        full.setattr(
            shutil, "copyfile", FullDisk(shutil.copyfile, after=0, error=FULL)
        )  # at the first tokenizer file
        assert "what has arrived is kept beside it" in refused(5, "pull", REPO, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    hub.downloads.clear()
    done("pull", REPO, tmp_path / "back")
    assert not [path for path in hub.downloads if path.endswith(".zst")]
