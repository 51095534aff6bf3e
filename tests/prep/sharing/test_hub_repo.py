"""A data set of the hub as a remote: visibility, revisions, two pushes at once, a hub that
fails."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_state import Hub
from pushed_sets import (
    REPO,
    content,
    done,
    make_set,
    refused,
)

from prep.sharing.push import PushOptions, push
from shared.errors import ArtifactError


def test_a_repository_is_private_unless_public_is_given(hub: Hub, shards: Path) -> None:
    done("push", shards, REPO)
    done("push", "--public", shards, "hf://writer/open")
    done("push", "--public", shards, "hf://datasets/writer/open")
    assert {name: repository.private for name, repository in hub.repositories.items()} == {
        REPO: True,
        "writer/open": False,
    }


def test_a_public_repository_is_pushed_to_only_with_public(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", "--public", shards, REPO)
    other = make_set(tmp_path / "other", seed=1)
    assert "is public; say --public" in refused(3, "push", "--replace", other, REPO)
    done("push", "--replace", "--public", other, REPO)


def test_a_revision_is_a_branch_of_its_own(hub: Hub, shards: Path, tmp_path: Path) -> None:
    other = make_set(tmp_path / "other", seed=1, num_packs=2)
    done("push", shards, REPO)
    done("push", "--revision", "small", other, REPO)
    done("pull", REPO, tmp_path / "main")
    done("pull", "--revision", "small", REPO, tmp_path / "small")
    assert content(tmp_path / "main") == content(shards)
    assert content(tmp_path / "small") == content(other)


def test_a_missing_revision_is_named(hub: Hub, shards: Path, tmp_path: Path) -> None:
    done("push", shards, REPO)
    line = refused(5, "pull", "--revision", "v9", REPO, tmp_path / "back")
    assert f"{REPO} at v9" in line
    assert "no such revision" in line
    assert "--revision is for hub data sets" in refused(
        3, "push", "--revision", "v9", shards, tmp_path / "pushed"
    )


@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_wrong_token_is_a_missing_prerequisite(
    command: str, hub: Hub, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("push", shards, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    arguments = (shards, "writer/new") if command == "push" else (REPO, tmp_path / "back")
    line = refused(6, command, *arguments)
    assert "answered 401" in line
    assert "hf auth login" in line


def test_no_network_and_offline_mode_are_missing_prerequisites(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "offline mode is on" in refused(6, "pull", REPO, tmp_path / "back")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check your network" in refused(6, "pull", REPO, tmp_path / "back")


@pytest.mark.parametrize(
    "request_line",
    [
        "POST /api/repos/create",
        f"GET /api/datasets/{REPO}/revision",
        "/tree/",
        "/preupload/",
        "objects/batch",
        "PUT /lfs/",
        "/commit/",
        "HEAD /datasets",
        "GET /datasets",
    ],
)
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


def test_a_download_that_is_cut_resumes_where_it_was(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    path = "shards/00000/tokens.npy.zst"
    commit = hub.repositories[REPO].branches["main"]
    hub.fail(f"GET /datasets/{REPO}/resolve/{commit}/{path}", "cut")
    done("pull", REPO, tmp_path / "back")
    assert hub.downloads[path] == 2
    assert content(tmp_path / "back") == content(shards)


def test_no_room_to_compress_is_one_line(
    hub: Hub, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert "name a larger directory with TMPDIR" in refused(5, "push", shards, REPO)
