"""sft-prep push: the manifest comes last, nothing is sent twice, and a push that was stopped
resumes."""

import json
from pathlib import Path

import pytest
from hub_state import Blob, Hub
from pushed_sets import (
    COLUMNS_PER_SHARD,
    REPO,
    command,
    content,
    done,
    kill_at,
    make_set,
    refused,
)

from shared.shard_reader import read_manifest


def test_a_pushed_set_comes_back_byte_for_byte(hub: Hub, shards: Path, tmp_path: Path) -> None:
    report = done("push", shards, REPO)
    assert read_manifest(shards).fingerprint in report
    assert "21 columns" in report
    done("pull", REPO, tmp_path / "back")
    assert content(tmp_path / "back") == content(shards)


def test_only_content_is_pushed_and_the_card_names_it(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    files = {path: blob.data for path, blob in hub.repositories[REPO].files().items()}
    assert {path.split("/")[0] for path in files} == {
        ".gitattributes",
        "README.md",
        "eval",
        "manifest.json",
        "shards",
        "tokenizer",
        "transfer.json",
    }
    card = files["README.md"].decode()
    assert card.startswith('---\npretty_name: "tiny"\n')
    assert read_manifest(shards).fingerprint in card
    assert "| made-up |" in card
    everything = b"".join(files.values())
    assert str(tmp_path).encode() not in everything
    assert b"my-machine" not in everything


def test_the_manifest_comes_last_and_each_shard_is_a_commit(hub: Hub, shards: Path) -> None:
    done("push", shards, REPO)
    repository = hub.repositories[REPO]
    assert repository.messages == [
        "initial commit",
        "Add shards/00000 of tiny",
        "Add shards/00001 of tiny",
        "Add eval/shards/00000 of tiny",
        "Add the manifest of tiny: the set is whole",
    ]
    with_manifest = ["manifest.json" in files for files in repository.commits.values()]
    assert with_manifest == [False] * 4 + [True]


@pytest.mark.parametrize("target", ["hub", "directory"])
def test_the_same_push_again_sends_nothing(
    target: str, hub: Hub, shards: Path, tmp_path: Path
) -> None:
    repo = REPO if target == "hub" else str(tmp_path / "pushed")
    done("push", shards, repo)
    before = set((tmp_path / "pushed").rglob("*"))
    hub.requests.clear()
    assert "is up to date" in done("push", shards, repo)
    assert hub.writes() == []
    assert set((tmp_path / "pushed").rglob("*")) == before


def test_an_edited_card_stays(hub: Hub, shards: Path) -> None:
    done("push", shards, REPO)
    hub.replace(REPO, "README.md", b"# Mine\n")
    assert "is up to date" in done("push", shards, REPO)
    hub.replace(REPO, "shards/00001/kind.npy.zst", None)
    done("push", shards, REPO)
    assert hub.repositories[REPO].files()["README.md"].data == b"# Mine\n"


def test_a_file_that_was_lost_in_the_repository_is_sent_again(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    hub.replace(REPO, "shards/00001/tokens.npy.zst", b"not these")
    hub.replace(REPO, "tokenizer/tokenizer.json", None)
    sent = sum(hub.uploads.values())
    done("push", shards, REPO)
    assert sum(hub.uploads.values()) == sent  # the hub still has the object, only the commit is new
    done("pull", REPO, tmp_path / "back")
    assert content(tmp_path / "back") == content(shards)


def test_of_a_set_with_another_name_only_the_manifest_is_sent(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    sent = sum(hub.uploads.values())
    done("push", make_set(tmp_path / "renamed", name="other"), REPO)
    assert sum(hub.uploads.values()) == sent
    assert json.loads(hub.repositories[REPO].files()["manifest.json"].data)["name"] == "other"


@pytest.mark.parametrize("target", ["hub", "directory"])
def test_another_set_is_replaced_only_with_replace(
    target: str, hub: Hub, shards: Path, tmp_path: Path
) -> None:
    repo = REPO if target == "hub" else str(tmp_path / "pushed")
    other = make_set(tmp_path / "other", seed=1, num_packs=2)
    done("push", shards, repo)
    line = refused(5, "push", other, repo)
    assert read_manifest(shards).fingerprint in line
    assert read_manifest(other).fingerprint in line
    done("push", "--replace", other, repo)
    done("pull", repo, tmp_path / "back")
    assert content(tmp_path / "back") == content(other)
    if target == "hub":
        assert not [
            path for path in hub.repositories[REPO].files() if path.startswith("shards/00001")
        ]
    else:
        assert not (tmp_path / "pushed" / "shards" / "00001").exists()


def test_a_set_that_does_not_verify_is_not_pushed(hub: Hub, shards: Path) -> None:
    column = shards / "shards" / "00001" / "tokens.npy"
    data = bytearray(column.read_bytes())
    data[-1] ^= 1
    column.write_bytes(data)
    assert "its bytes have changed" in refused(5, "push", shards, REPO)
    (shards / "manifest.json").unlink()
    assert "has no manifest.json" in refused(5, "push", shards, REPO)
    assert hub.writes() == []


def test_a_foreign_manifest_or_directory_is_left_alone(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    hub.replace(REPO, "transfer.json", None)
    assert "no push put there" in refused(5, "push", "--replace", shards, REPO)
    before = content(shards)
    assert "is a shard set, not a place" in refused(5, "push", shards, shards)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    assert "a directory of other files" in refused(
        5, "push", "--replace", shards, tmp_path / "mine"
    )
    assert content(shards) == before


def test_files_of_others_among_a_set_on_the_hub_stay(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    hub.repositories[REPO].files()["shards/notes.txt"] = Blob(b"mine", False)
    done("push", "--replace", make_set(tmp_path / "other", seed=1), REPO)
    assert hub.repositories[REPO].files()["shards/notes.txt"].data == b"mine"


def test_a_push_cut_in_mid_upload_resumes_and_sends_no_file_twice(
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


def test_a_replacement_that_was_cut_resumes_without_another_replace(
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


def test_a_killed_push_sends_only_what_has_not_arrived(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    fault = hub.fail("/commit/", "hold")
    kill_at(fault, command(hub, tmp_path / "home", "push", shards, REPO))
    assert sum(hub.uploads.values()) == COLUMNS_PER_SHARD
    done("push", shards, REPO)
    assert set(hub.uploads.values()) == {1}
    done("pull", REPO, tmp_path / "back")
    assert content(tmp_path / "back") == content(shards)
