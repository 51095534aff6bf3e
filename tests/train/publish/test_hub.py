"""A trained model on the hub: whole, verified, private, and only if asked; a failed push loses
nothing."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_state import TOKEN, Hub
from train_runs import train_here, write_inputs
from writable_hub import serve_hub

SFT_TRAIN = Path(sys.executable).with_name("sft-train")
REPO = "user/tiny"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A set, a recipe, and a complete run."""
    folder = tmp_path_factory.mktemp("inputs")
    shards, recipe = write_inputs(folder)
    run = folder / "run"
    done = train_here("--shards", shards, "--recipe", recipe, "--output", run, "--max-steps", 2)
    assert done.exit_code == 0
    return shards, recipe, run


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as served:
        yield served


def call(hub: Hub, home: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    words = [SFT_TRAIN, *(str(argument) for argument in arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=200)


def held(hub: Hub) -> dict[str, bytes]:
    return {
        name: blob.data
        for name, blob in hub.repositories[REPO].files().items()
        if name != ".gitattributes"
    }


def local(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "model").iterdir()}


def test_a_model_arrives_whole_with_its_card_and_curves_and_is_not_sent_twice(
    hub: Hub, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    run = inputs[2]
    done = call(hub, tmp_path, "push", run, REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.endpoint}/{REPO}\n"
    assert held(hub) == local(run)
    assert {"README.md", "loss.png", "tokenizer.json", "generation_config.json"} < local(run).keys()
    assert b"![curves of the run](loss.png)" in held(hub)["README.md"]
    assert hub.repositories[REPO].private
    uploads, commits = sum(hub.uploads.values()), len(hub.repositories[REPO].commits)
    assert call(hub, tmp_path, "push", run / "model", REPO).returncode == 0
    assert (sum(hub.uploads.values()), len(hub.repositories[REPO].commits)) == (uploads, commits)


def test_a_run_pushes_only_if_asked_and_the_same_command_pushes_after_a_failure(
    hub: Hub, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train = ("--shards", inputs[0], "--recipe", inputs[1], "--output", run, "--max-steps", 2)
    assert call(hub, tmp_path, *train).returncode == 0
    assert hub.requests == []  # never by default
    hub.fail("/commit/", "403")
    failed = call(hub, tmp_path, *train, "--push-to-hub", REPO)
    assert failed.returncode == 6
    assert "the hub answered 403; log in with `hf auth login`" in failed.stderr
    assert f"all is safe in {run / 'model'}" in failed.stderr
    again = call(hub, tmp_path, *train, "--push-to-hub", REPO)
    assert again.returncode == 0, again.stderr
    assert held(hub) == local(run)


def test_a_busy_hub_is_asked_again(
    hub: Hub, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    hub.fail("/commit/", "503")
    done = call(hub, tmp_path, "push", inputs[2], REPO)
    assert done.returncode == 0, done.stderr
    assert held(hub) == local(inputs[2])


def test_weights_of_an_older_push_go_away(
    hub: Hub, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    assert call(hub, tmp_path, "push", inputs[2], REPO).returncode == 0
    files = dict(hub.repositories[REPO].files())
    files["model-00001-of-00002.safetensors"] = files["model.safetensors"]
    hub.commit(hub.repositories[REPO], "main", files, "an older model in two files")
    assert call(hub, tmp_path, "push", inputs[2], REPO).returncode == 0
    assert held(hub) == local(inputs[2])


def test_what_is_no_model_and_no_name_is_refused(
    hub: Hub, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    refused = call(hub, tmp_path, "push", tmp_path, REPO)
    assert refused.returncode == 5
    assert "holds no exported model" in refused.stderr
    bad_name = call(hub, tmp_path, "push", inputs[2], "a/b/c")
    assert bad_name.returncode == 3
    assert "expected user/name" in bad_name.stderr
