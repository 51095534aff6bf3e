"""No file is unpickled except for those of DeepSpeed, after their digests matched."""

import ast
from pathlib import Path

import pytest
from repository import ROOT

SOURCES = sorted(
    path for name in ("prep", "train", "shared") for path in (ROOT / name).rglob("*.py")
)
ALLOWED = {
    # The weights in a checkpoint of ours, after its digests matched.
    "train/publish/export.py": 1,
    # Such a checkpoint, and the files that the converter has just made from it.
    "train/checkpoint/reshard.py": 6,
}


def unpickling_calls(path: Path) -> int:
    """Count calls of a name that unpickles: torch.load, pickle.load(s), numpy's
    allow_pickle=True."""
    count = 0
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            count += owner in ("torch", "pickle", "joblib", "dill") and node.func.attr in (
                "load",
                "loads",
            )
            count += any(
                keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
                for keyword in node.keywords
            )
    return count


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_verified_engine_files_are_unpickled(path: Path) -> None:
    assert unpickling_calls(path) == ALLOWED.get(path.relative_to(ROOT).as_posix(), 0)


@pytest.mark.parametrize("name", ALLOWED)
def test_the_count_sees_calls_that_exist(name: str) -> None:
    assert unpickling_calls(ROOT / name) > 0
