"""Pinning: every moving revision becomes the commit that the hub names, and nothing else in the
file changes."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import COMMIT, client_environment, serve_repositories

SFT_PREP = Path(sys.executable).with_name("sft-prep")
MIXTURE = """\
# the comment stays
name = "mine"
max_seq_len = 64
[tokenizer]
name = "org/model"                   # and this one
[template]
name = "tulu"
[[sources]]
path = "org/chats"
split = "train"
[[sources]]
path = "rows.jsonl"
[[sources]]
path = "org/chats"
revision = "main"
name = "again"
[[sources]]
path = "org/chats"
revision = "89abcdef0123456789abcdef0123456789abcdef"
name = "old"
"""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hub")
    (root / "README.md").write_text("# nothing\n")
    names = ("models/org/model", "datasets/org/chats", "models/meta-llama/Llama-3.1-8B",
             "datasets/allenai/tulu-3-sft-mixture")  # fmt: skip
    with serve_repositories(dict.fromkeys(names, root)) as address:
        yield address


def pin(folder: Path, endpoint: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **client_environment(folder / "home", endpoint)}
    return subprocess.run(
        [SFT_PREP, "pin", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=100,
    )


def test_a_file_is_pinned_in_place(endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MIXTURE)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    done = pin(tmp_path, endpoint, "mine.toml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"org/model: main is {COMMIT}",
        f"org/chats: main is {COMMIT}",
        "rows.jsonl: local, identified by its content",
        f"org/chats: main is {COMMIT}",
        "org/chats: 89abcdef0123456789abcdef0123456789abcdef, pinned before",
        "mine.toml",
    ]
    pinned = f'revision = "{COMMIT}"'
    before = MIXTURE.splitlines()
    expected = [*before[:5], pinned, *before[5:9], pinned, *before[9:14], pinned, *before[15:]]
    assert file.read_text().splitlines() == expected
    again = pin(tmp_path, endpoint, "mine.toml")
    assert again.stdout.count("pinned before") == 4
    assert file.read_text().splitlines() == expected


def test_a_shipped_mixture_is_pinned_into_a_file_here(endpoint: str, tmp_path: Path) -> None:
    done = pin(tmp_path, endpoint, "tulu3")
    assert done.returncode == 0, done.stderr
    tables = tomllib.loads((tmp_path / "tulu3.toml").read_text())
    assert tables["tokenizer"]["revision"] == tables["sources"][0]["revision"] == COMMIT


def test_what_cannot_be_pinned_leaves_the_file_alone(endpoint: str, tmp_path: Path) -> None:
    cases = {
        "unknown.toml": (MIXTURE.replace("org/model", "org/none"), 4, "org/none"),
        "inline.toml": (
            MIXTURE.replace('[tokenizer]\nname = "org/model"', 'tokenizer.name = "org/model"'),
            3,
            "each key on a line",
        ),
    }
    for name, (text, code, message) in cases.items():
        (tmp_path / name).write_text(text)
        (tmp_path / "rows.jsonl").write_text("{}\n")
        done = pin(tmp_path, endpoint, name)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert (tmp_path / name).read_text() == text
    (tmp_path / "mine.toml").write_text(MIXTURE)
    done = pin(tmp_path, endpoint, "mine.toml", "--out", "other/mine.toml")
    assert done.returncode == 3
    assert "is a path beside it" in done.stderr
