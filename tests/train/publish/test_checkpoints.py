"""A checkpoint on the hub: a branch with exactly the files that state.json lists, checked before
they are sent."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_state import Hub
from pushed_sets import client_of_a_hub

from shared.errors import ArtifactError, ChecksumError, IncompleteArtifactError
from shared.hashing import sha256_bytes
from train.publish.checkpoints import push_checkpoint, push_checkpoints
from train.run.checkpoint_layout import FORMAT_VERSION
from train.run.directory import RunDir

REPO = "user/tiny"
FILES = {
    "engine/state/weights.pt": bytes(range(256)) * 9,
    "model/config.json": b"{}",
    "run.json": b'{"name": "run"}',
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with client_of_a_hub(tmp_path, monkeypatch) as served:
        yield served


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with the checkpoints of steps 2 and 4."""
    for step in (2, 4):
        write_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step:08}", step)
    return tmp_path / "run"


def write_checkpoint(path: Path, step: int) -> None:
    entries = {}
    for name, data in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data + bytes([step]))
        entries[name] = {"bytes": len(data) + 1, "sha256": sha256_bytes(data + bytes([step]))}
    state = {"format_version": FORMAT_VERSION, "step": step, "files": entries}
    (path / "state.json").write_text(json.dumps(state))


def on_disk(checkpoint: Path) -> dict[str, bytes]:
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    return {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in files}


def on_branch(hub: Hub, branch: str) -> dict[str, bytes]:
    files = hub.repositories[REPO].files(branch)
    return {name: blob.data for name, blob in files.items() if name != ".gitattributes"}


def test_every_checkpoint_of_a_run_is_a_branch_with_its_files(hub: Hub, run: Path) -> None:
    addresses = push_checkpoints(RunDir(run), REPO)
    assert addresses == [
        f"{hub.endpoint}/{REPO}/tree/run-step-00000004",
        f"{hub.endpoint}/{REPO}/tree/run-step-00000002",
    ]
    for name in ("step-00000002", "step-00000004"):
        assert on_branch(hub, f"run-{name}") == on_disk(run / "checkpoints" / name)
    assert on_branch(hub, "main") == {}
    assert hub.repositories[REPO].private
    commits = len(hub.repositories[REPO].commits)
    assert push_checkpoints(RunDir(run), REPO) == addresses
    assert len(hub.repositories[REPO].commits) == commits


def test_a_branch_is_named_by_the_step_that_a_link_leads_to(hub: Hub, run: Path) -> None:
    (run / "checkpoints" / "best").symlink_to("step-00000002")
    address = push_checkpoint(run / "checkpoints" / "best", REPO)
    assert address.endswith("/tree/run-step-00000002")


def test_a_file_on_the_branch_that_the_checkpoint_does_not_have_goes_away(
    hub: Hub, run: Path
) -> None:
    checkpoint = run / "checkpoints" / "step-00000002"
    push_checkpoint(checkpoint, REPO)
    repository = hub.repositories[REPO]
    files = repository.files("run-step-00000002")
    hub.commit(
        repository, "run-step-00000002", {**files, "old.pt": files["run.json"]}, "of an older try"
    )
    push_checkpoint(checkpoint, REPO)
    assert on_branch(hub, "run-step-00000002") == on_disk(checkpoint)


def test_a_damaged_file_is_not_sent(hub: Hub, run: Path) -> None:
    file = run / "checkpoints" / "step-00000002" / "engine" / "state" / "weights.pt"
    data = file.read_bytes()
    file.write_bytes(b"?" + data[1:])
    with pytest.raises(ChecksumError, match=f"{file}: its bytes have changed .* was not pushed"):
        push_checkpoint(run / "checkpoints" / "step-00000002", REPO)
    assert on_branch(hub, "run-step-00000002") == {}
    assert not hub.uploads
    for change in (lambda: file.write_bytes(data[:-1]), file.unlink):
        change()
        with pytest.raises(
            IncompleteArtifactError, match=f"{file} is missing or not of 2305 bytes"
        ):
            push_checkpoint(run / "checkpoints" / "step-00000002", REPO)
    assert not hub.uploads


def test_other_bytes_on_the_hub_after_the_push_are_an_error(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit

    def lossy(repository: object, branch: str, files: dict[str, object], message: str) -> str:
        files.pop("run.json", None)
        return commit(repository, branch, files, message)  # type: ignore[arg-type]

    monkeypatch.setattr(hub, "commit", lossy)
    with pytest.raises(ChecksumError, match=f"{REPO} does not hold run.json as "):
        push_checkpoint(run / "checkpoints" / "step-00000002", REPO)


def test_a_directory_without_checkpoints_is_refused(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(IncompleteArtifactError, match="has no checkpoint"):
        push_checkpoints(RunDir(tmp_path / "run"), REPO)
    with pytest.raises(ArtifactError):
        push_checkpoint(tmp_path / "run", REPO)
    assert hub.requests == []
