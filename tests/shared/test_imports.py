"""The dependency rule (prep -> shared <- train) holds, and importing a package stays light."""

import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

STARTUP = {
    "_distutils_hack",
    "_virtualenv",
    "sitecustomize",
    "usercustomize",
}  # what some environments load by .pth


def test_the_import_contracts_hold() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def third_party_after(statement: str) -> set[str]:
    """Return the third-party packages that a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    ours = {"prep", "train", "shared", "__main__", "__mp_main__"}
    found = {name for name in done.stdout.split() if not name.startswith("__editable__")}
    return found - ours - STARTUP - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("prep", set()),
        ("train", set()),
        ("shared", set()),
        ("shared.errors", set()),
        ("shared.config", set()),
        ("shared.hashing", set()),
        ("shared.atomic", set()),
        ("shared.disk", set()),
        ("shared.file_stamp", set()),
        ("shared.log", set()),
        ("shared.markdown", set()),
        ("shared.command", set()),
        ("shared.shard_format", set()),
        ("shared.splitmix", {"numpy"}),
        ("shared.shard_reader", {"numpy"}),
        ("shared.shard_writer", {"numpy"}),
        ("prep.config", set()),
        ("train.config", set()),
        ("prep.cli.main", {"click"}),
        ("train.cli.main", {"click"}),
    ],
)
def test_a_module_loads_no_more_than_it_must(module: str, allowed: set[str]) -> None:
    assert third_party_after(f"import {module}") <= allowed


def test_the_hub_is_the_one_exception_and_loads_its_client_alone() -> None:
    client = third_party_after("from huggingface_hub import errors, hf_api")
    assert third_party_after("import shared.hub") <= client
    assert not client & {"numpy", "torch", "transformers", "datasets"}


def test_reading_shards_needs_no_training_library() -> None:
    assert third_party_after("import shared.shard_reader, prep.config, train.config") == {"numpy"}


def test_every_shared_module_is_in_the_table_above() -> None:
    modules = {path.stem for path in (ROOT / "shared").glob("*.py")} - {"__init__", "hub"}
    listed = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in sorted(modules) if f'"shared.{name}"' not in listed] == []
