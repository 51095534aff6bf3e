"""push and pull through the real client against a hub on the loopback device, and to a
directory."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hub_state import Blob, Hub
from pushed_sets import REPO, client_of_a_hub, content, done, make_set, refused

from prep.sharing import replaceable_push
from prep.sharing.dataset_card import render_set_card
from prep.sharing.remote import parse_repo
from prep.sharing.wire_format import contents_of_set
from shared.errors import ConfigError
from shared.hashing import canonical_json, sha256_bytes
from shared.shard_reader import read_manifest


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_set(tmp_path / "tiny")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with client_of_a_hub(tmp_path, monkeypatch) as served:
        yield served


# the whole way


def test_a_pushed_set_comes_back_byte_for_byte(hub: Hub, shards: Path, tmp_path: Path) -> None:
    said = done("push", shards, REPO)
    assert read_manifest(shards).fingerprint in said
    assert "21 columns" in said
    done("pull", REPO, tmp_path / "back")
    assert content(tmp_path / "back") == content(shards)


def test_only_content_is_pushed_and_the_card_names_it(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    files = {path: blob.data for path, blob in hub.repositories[REPO].files().items()}
    assert {path.split("/")[0] for path in files} == {
        ".gitattributes", "README.md", "eval", "manifest.json", "shards", "tokenizer", "transfer.json",
    }  # fmt: skip
    card = files["README.md"].decode()
    assert card.startswith('---\npretty_name: "tiny"\n')
    assert read_manifest(shards).fingerprint in card
    assert "| made-up |" in card
    everything = b"".join(files.values())
    assert str(tmp_path).encode() not in everything
    assert b"my-machine" not in everything


def test_transfer_json_has_the_digests_of_both_ends(hub: Hub, shards: Path) -> None:
    done("push", shards, REPO)
    files = {path: blob.data for path, blob in hub.repositories[REPO].files().items()}
    transfer = json.loads(files["transfer.json"])
    assert canonical_json(transfer) == files["transfer.json"]
    assert {path + ".zst" for path in transfer["columns"]} == {
        path for path in files if path.endswith(".zst")
    }
    for path, entry in transfer["columns"].items():
        raw, stored = (shards / path).read_bytes(), files[path + ".zst"]
        assert (entry["bytes"], entry["sha256"]) == (len(raw), sha256_bytes(raw))
        assert entry["zstd"] == {"bytes": len(stored), "sha256": sha256_bytes(stored)}
        assert zstandard.decompress(stored) == raw


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


def test_a_set_with_another_name_sends_its_manifest_alone(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    sent = sum(hub.uploads.values())
    done("push", make_set(tmp_path / "renamed", name="other"), REPO)
    assert sum(hub.uploads.values()) == sent
    assert json.loads(hub.repositories[REPO].files()["manifest.json"].data)["name"] == "other"


def test_a_repository_is_private_unless_told_otherwise(hub: Hub, shards: Path) -> None:
    done("push", shards, REPO)
    done("push", "--public", shards, "hf://writer/open")
    done("push", "--public", shards, "hf://datasets/writer/open")
    assert {name: repository.private for name, repository in hub.repositories.items()} == {
        REPO: True,
        "writer/open": False,
    }


def test_a_public_repository_is_pushed_to_only_if_that_is_said(
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


def test_a_commit_can_be_pulled_after_the_set_was_replaced(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    commit = hub.repositories[REPO].branches["main"]
    done("push", "--replace", make_set(tmp_path / "other", seed=1), REPO)
    done("pull", "--revision", commit, REPO, tmp_path / "back")
    assert content(tmp_path / "back") == content(shards)


@pytest.mark.parametrize("target", ["hub", "directory"])
def test_another_set_in_the_place_is_refused_unless_it_is_to_be_replaced(
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


def test_a_file_that_comes_while_a_place_is_replaced_is_kept(
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


def test_files_of_others_among_a_set_on_the_hub_stay(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    done("push", shards, REPO)
    hub.repositories[REPO].files()["shards/notes.txt"] = Blob(b"mine", False)
    done("push", "--replace", make_set(tmp_path / "other", seed=1), REPO)
    assert hub.repositories[REPO].files()["shards/notes.txt"].data == b"mine"


def test_pull_does_not_replace_what_it_did_not_make(hub: Hub, shards: Path, tmp_path: Path) -> None:
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


def test_a_hub_that_is_not_there_or_not_wanted_is_a_missing_prerequisite(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "offline mode is on" in refused(6, "pull", REPO, tmp_path / "back")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check your network" in refused(6, "pull", REPO, tmp_path / "back")


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


# directories


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


def test_a_pull_goes_to_data_cache_by_default(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done("push", shards, "./pushed")
    done("pull", "pushed")
    assert content(tmp_path / "data_cache" / "pushed") == content(shards)


def test_a_card_survives_any_name(tmp_path: Path) -> None:
    made = make_set(tmp_path / "tiny", name='a "b" | <script>\n# c')
    card = render_set_card(contents_of_set(made)).decode()
    assert '\npretty_name: "a \\"b\\" | <script>\\n# c"\n' in card
    assert '\n# a "b" \\| &lt;script> # c\n' in card
