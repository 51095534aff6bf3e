"""docs/reference.md lists every key of a mixture and of a recipe as the code has it."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from repository import ROOT

from prep.config import MixtureConfig
from train.config import TrainConfig

SCRIPT = ROOT / "docs" / "generate_reference.py"


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("generate_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate_reference"] = module  # its dataclasses look there for their annotations
    spec.loader.exec_module(module)
    return module


reference = loaded()


def keys_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a configuration, found without the script."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        inner = next(
            (one for one in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(one)),
            None,
        )
        if isinstance(inner, type):
            yield from keys_of(inner, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_the_page_is_what_the_script_writes() -> None:
    written = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert written == reference.page(), "run python docs/generate_reference.py"


@pytest.mark.parametrize("cls", [MixtureConfig, TrainConfig])
def test_every_key_is_listed_once(cls: type) -> None:
    listed = [
        f"{table.name}.{key.name}" if table.name else key.name
        for table in reference.tables_of(cls)
        for key in table.keys
    ]
    assert sorted(listed) == sorted(keys_of(cls))


@pytest.mark.parametrize(
    ("cls", "table", "key", "expected"),
    [
        (TrainConfig, "optim", "learning_rate", "above 0 to 100"),
        (TrainConfig, "optim", "betas", "0 to below 1"),
        (TrainConfig, "model", "mlp_tiles", "1 to 64"),
        (TrainConfig, "batch", "tokens_per_step", "1 to 2<sup>31</sup> - 1"),
        (TrainConfig, "run", "seed", ""),
        (MixtureConfig, "sources", "fraction", "above 0 to 1"),
        (MixtureConfig, "sources", "group_epochs", "0 to 10,000"),
        (MixtureConfig, "mixing", "temperature", "above 0"),
        (MixtureConfig, "sources", "min_tokens", "1 or more"),
        (MixtureConfig, "mask", "boundary", '`"overlap"`, `"inside"`'),
    ],
)
def test_ranges_are_those_of_the_checks(cls: type, table: str, key: str, expected: str) -> None:
    (found,) = (one for one in reference.tables_of(cls) if one.name == table)
    (listed,) = (one for one in found.keys if one.name == key)
    assert listed.range == expected


def test_the_script_needs_the_standard_library_alone(tmp_path: Path) -> None:
    page = tmp_path / "reference.md"
    code = (
        f"import runpy, sys; found = runpy.run_path({str(SCRIPT)!r}); text = found['page']();"
        f" open({str(page)!r}, 'w').write(text);"
        " print(sorted({'numpy', 'torch', 'click', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert page.stat().st_size > 10_000
