"""The hub's client: what is asked again, what its errors mean to a user, which files are there."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_state import Hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile
from pushed_sets import client_of_a_hub

from shared.errors import (
    ArtifactError,
    ChecksumError,
    ConfigError,
    PrerequisiteError,
    SftError,
)
from shared.hashing import sha256_bytes
from shared.hub import NO_ANSWER, is_on_hub, retrying, translate_hub_errors

REPO = "writer/things"
FILES = {"small.txt": b"few bytes", "large.zst": b"many bytes", "empty.txt": b""}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with client_of_a_hub(tmp_path, monkeypatch) as served:
        yield served


def fill() -> dict[str, RepoFile]:
    api = HfApi()
    api.create_repo(REPO, repo_type="dataset")
    additions = [CommitOperationAdd(name, data) for name, data in FILES.items()]
    api.create_commit(REPO, additions, commit_message="all", repo_type="dataset")
    listed = api.list_repo_tree(REPO, repo_type="dataset", recursive=True)
    return {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_on_the_hub_if_size_and_hash_agree(hub: Hub, tmp_path: Path, name: str) -> None:
    listed, data = fill()[name], FILES[name]
    path = tmp_path / "local"
    path.write_bytes(data)
    for content in (data, path):
        assert is_on_hub(listed, num_bytes=len(data), content=content)
    assert not is_on_hub(listed, num_bytes=len(data) + 1, content=data)
    assert not is_on_hub(None, num_bytes=len(data), content=data)
    if data:
        assert not is_on_hub(listed, num_bytes=len(data), content=data[:-1] + b"?")
    # only a large file is listed with its sha256
    is_large = is_on_hub(listed, num_bytes=len(data), sha256=sha256_bytes(data))
    assert is_large == (name == "large.zst")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_hub_is_asked_three_times_more(
    hub: Hub, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill()
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    fault = hub.fail(f"GET /api/datasets/{REPO}", str(status), times=3)
    with caplog.at_level(logging.WARNING, "shared"):
        assert retrying(lambda: HfApi().dataset_info(REPO)).id == REPO
    assert pauses == [1.0, 3.0, 9.0]
    assert caplog.messages == [f"the hub answered {status}; again in {s} s" for s in (1, 3, 9)]
    fault.times = 4
    with (
        pytest.raises(
            PrerequisiteError, match=f"cannot look: the hub answered {status}; try later"
        ),
        translate_hub_errors("look"),
    ):
        retrying(lambda: HfApi().dataset_info(REPO))


@pytest.mark.parametrize(
    ("status", "kind", "remedy"),
    [
        ("400", ArtifactError, "Bad request: Made to fail"),
        ("401", PrerequisiteError, "hf auth login.*401 may also mean that it does not exist"),
        ("403", PrerequisiteError, "hf auth login"),
        ("409", ArtifactError, "someone else pushed at the same time"),
        ("412", ArtifactError, "someone else pushed at the same time"),
    ],
)
def test_a_refusal_is_not_asked_again_and_says_what_to_do(
    hub: Hub, status: str, kind: type[SftError], remedy: str
) -> None:
    fill()
    hub.requests.clear()
    hub.fail(f"GET /api/datasets/{REPO}", status)
    with (
        pytest.raises(
            kind, match=f"cannot look: the hub answered {status}; .*{remedy}.*; so there$"
        ),
        translate_hub_errors("look", hint="; so there"),
    ):
        retrying(lambda: HfApi().dataset_info(REPO))
    assert len(hub.requests) == 1


def test_what_does_not_exist_is_named(hub: Hub) -> None:
    with (
        pytest.raises(ArtifactError, match="answered 404; there is no such repository"),
        translate_hub_errors("look"),
    ):
        HfApi().dataset_info("writer/none")
    fill()
    with (
        pytest.raises(ArtifactError, match="answered 404; there is no such revision"),
        translate_hub_errors("look"),
    ):
        HfApi().dataset_info(REPO, revision="v9")


@pytest.mark.parametrize(
    ("repo", "endpoint", "offline", "kind", "reason"),
    [
        ("a/b/c", "", False, ConfigError, "not the name of a hub repository; expected user/name"),
        (REPO, "", True, PrerequisiteError, "unset HF_HUB_OFFLINE"),
        (REPO, "http://127.0.0.1:9", False, PrerequisiteError, "check your network"),
    ],
)
def test_no_answer_is_an_error_that_a_user_can_act_on(
    hub: Hub,
    repo: str,
    endpoint: str,
    offline: bool,
    kind: type[SftError],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    api = HfApi(endpoint=endpoint or None)
    with pytest.raises(kind, match=reason), translate_hub_errors("look"):
        api.dataset_info(repo)
    with pytest.raises(NO_ANSWER):
        api.dataset_info(repo)


def test_a_disk_that_refuses_is_named_and_errors_of_ours_pass() -> None:
    with (
        pytest.raises(ArtifactError, match="No space left on device; make room"),
        translate_hub_errors("look"),
    ):
        raise OSError(28, "No space left on device")
    for error in (ChecksumError("ours"), KeyError("a bug")):
        with pytest.raises(type(error)) as caught, translate_hub_errors("look"):
            raise error
        assert caught.value is error


def test_the_error_within_the_error_of_an_upload_is_what_is_reported() -> None:
    error = RuntimeError("Error while uploading")
    error.__cause__ = ConnectionResetError("connection reset")
    with (
        pytest.raises(PrerequisiteError, match="connection reset; check your network"),
        translate_hub_errors("look"),
    ):
        raise error
