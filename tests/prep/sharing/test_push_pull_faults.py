"""push and pull when something fails: nothing half is left in a place, nothing is sent or fetched
twice."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hub_state import Hub
from pushed_sets import (
    COLUMNS_PER_SHARD,
    REPO,
    client_of_a_hub,
    command,
    content,
    done,
    kill_at,
    make_set,
    refused,
    run,
)

from prep.sharing.push import PushOptions, push
from prep.sharing.wire_format import ColumnEntry, compress, decompress
from shared.errors import ArtifactError, ChecksumError
from shared.hashing import canonical_json, sha256_bytes
from shared.shard_format import FileEntry


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_set(tmp_path / "tiny")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with client_of_a_hub(tmp_path, monkeypatch) as served:
        yield served


# what goes wrong on the way


def test_a_push_cut_in_mid_upload_goes_on_and_sends_no_file_twice(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    probe = tmp_path / "probe"
    done("push", shards, probe)
    cut = json.loads((probe / "transfer.json").read_bytes())["columns"]["shards/00001/tokens.npy"][
        "zstd"
    ]["sha256"]
    hub.fail(f"PUT /lfs/{cut}", "cut", times=6)  # the client tries six times
    assert "check your network, then run it again" in refused(6, "push", shards, REPO)
    assert "manifest.json" not in hub.repositories[REPO].files()
    assert "unfinished push: it has no manifest.json" in refused(5, "pull", REPO, tmp_path / "back")
    other = make_set(tmp_path / "other", seed=1)
    assert "holds an unfinished push of the set" in refused(5, "push", other, REPO)
    hub.requests.clear()
    done("push", shards, REPO)
    assert set(hub.uploads.values()) == {1}
    assert hub.repositories[REPO].messages.count("Add shards/00000 of tiny") == 1
    done("pull", REPO, tmp_path / "back")
    assert content(tmp_path / "back") == content(shards)


def test_a_replacement_that_was_cut_goes_on_and_needs_no_second_permission(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    other = make_set(tmp_path / "other", seed=1)
    done("push", shards, REPO)
    hub.fail("PUT /lfs/", "cut", times=99)
    refused(6, "push", "--replace", other, REPO)
    hub.faults.clear()
    assert "unfinished push" in refused(5, "pull", REPO, tmp_path / "back")
    assert "unfinished push of the set" in refused(5, "push", shards, REPO)
    done("push", other, REPO)
    done("pull", REPO, tmp_path / "back")
    assert content(tmp_path / "back") == content(other)


@pytest.mark.parametrize(
    "request_line",
    [
        "POST /api/repos/create", f"GET /api/datasets/{REPO}/revision", "/tree/", "/preupload/", "objects/batch",
        "PUT /lfs/", "/commit/", "HEAD /datasets", "GET /datasets",
    ],
)  # fmt: skip
def test_one_500_does_no_harm(request_line: str, hub: Hub, shards: Path, tmp_path: Path) -> None:
    if request_line.endswith("/revision"):
        done("push", shards, REPO)
    fault = hub.fail(request_line, "500")
    done("push", shards, REPO)
    done("pull", REPO, tmp_path / "back")
    assert fault.times == 0
    assert content(tmp_path / "back") == content(shards)


def test_a_hub_that_stays_broken_is_one_line(hub: Hub, shards: Path, tmp_path: Path) -> None:
    hub.fail("/commit/", "503", times=99)
    line = refused(6, "push", shards, REPO)
    assert (
        "cannot push to the hub data set writer/tiny-shards: the hub answered 503; try later"
        in line
    )


def test_two_pushes_at_once_do_not_mix(hub: Hub, shards: Path) -> None:
    held = hub.fail("/commit/", "hold")
    with ThreadPoolExecutor(1) as pool:
        options = PushOptions(revision=None, public=False, replace=False, workers=2)
        first = pool.submit(push, shards, REPO, options)
        assert held.reached.wait(60)
        hub.commit(hub.repositories[REPO], "main", {}, "of someone else")
        held.released.set()
        with pytest.raises(ArtifactError, match="answered 412; someone else pushed"):
            first.result()


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


def test_a_download_that_is_cut_goes_on_where_it_was(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    path = "shards/00000/tokens.npy.zst"
    commit = hub.repositories[REPO].branches["main"]
    hub.fail(f"GET /datasets/{REPO}/resolve/{commit}/{path}", "cut")
    done("pull", REPO, tmp_path / "back")
    assert hub.downloads[path] == 2
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


def test_a_damaged_set_is_mended_by_fetching_what_is_damaged(
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


def test_a_killed_pull_goes_on_with_what_has_arrived(
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


def test_a_killed_push_goes_on_with_what_has_arrived(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    fault = hub.fail("/commit/", "hold")
    kill_at(fault, command(hub, tmp_path / "home", "push", shards, REPO))
    assert sum(hub.uploads.values()) == COLUMNS_PER_SHARD
    done("push", shards, REPO)
    assert set(hub.uploads.values()) == {1}
    done("pull", REPO, tmp_path / "back")
    assert content(tmp_path / "back") == content(shards)


class FullDisk:
    """Stands for a call of the system that fails from its nth time on."""

    def __init__(self, call: Callable[..., None], *, after: int, error: BaseException) -> None:
        self.call, self.left, self.error = call, after, error

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error
        self.call(*arguments, **options)


FULL = OSError(errno.ENOSPC, "No space left on device")


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


def test_a_stopped_push_to_a_directory_goes_on(
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


def test_no_room_to_compress_is_one_line(
    hub: Hub, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert "name a larger directory with TMPDIR" in refused(5, "push", shards, REPO)


# compression


def test_compression_is_the_same_every_time_and_refuses_a_changed_file(tmp_path: Path) -> None:
    data = os.urandom(1000) * 5000
    (tmp_path / "column").write_bytes(data)
    expected = FileEntry(bytes=len(data), sha256=sha256_bytes(data))
    first = compress(tmp_path / "column", tmp_path / "one", expected)
    assert compress(tmp_path / "column", tmp_path / "two", expected) == first
    assert first == FileEntry(
        bytes=(tmp_path / "one").stat().st_size,
        sha256=sha256_bytes((tmp_path / "one").read_bytes()),
    )
    for changed in (data[:-1], data[:-1] + b"?"):
        (tmp_path / "column").write_bytes(changed)
        with pytest.raises(ChecksumError, match="changed while it was pushed"):
            compress(tmp_path / "column", tmp_path / "three", expected)


def test_a_frame_that_swells_is_stopped_at_the_size_that_was_announced(tmp_path: Path) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    (tmp_path / "bomb").write_bytes(bomb)
    stored = FileEntry(bytes=len(bomb), sha256=sha256_bytes(bomb))
    entry = ColumnEntry(bytes=10, sha256=sha256_bytes(bytes(10)), zstd=stored)
    with pytest.raises(ChecksumError, match="holds 11 bytes or more"):
        decompress(tmp_path / "bomb", tmp_path / "column", entry, where="here")
    assert [path.name for path in tmp_path.iterdir()] == ["bomb"]
