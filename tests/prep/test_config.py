"""Every key of a mixture file with values of a wrong type or size: one line that names it, or a
build."""

import contextlib
import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows, write_toml

from prep import config as mixture_config
from prep.cli.main import main
from shared.errors import SftError

VALUES: list[Any] = [
    True, 0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**63, 2**64, 10**30,
    10**400, 0.0, 0.5, -0.5, 1e-300, 1e300, float("inf"), float("nan"),
    "", "x", "\x00", "/", "..", "\ud800", "x" * 5000,
    [], [1], ["x"], [[]], [{}], {}, {"x": 1}, {"": ""}, None,
]  # fmt: skip
TABLES = {
    "": mixture_config.MixtureConfig,
    "mask": mixture_config.MaskConfig,
    "lengths": mixture_config.LengthsConfig,
    "rows": mixture_config.RowsConfig,
    "eval": mixture_config.EvalConfig,
    "dedup": mixture_config.DedupConfig,
    "decontaminate": mixture_config.DecontaminateConfig,
    "mixing": mixture_config.MixingConfig,
    "sources": mixture_config.SourceConfig,
}
KEYS = [
    (table, field.name)
    for table, cls in TABLES.items()
    for field in dataclasses.fields(typing.cast(Any, cls))
]
NOT_HERE = {("", "tokenizer"), ("sources", "path")}  # looked for on the hub where they are no path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    small_tokenizer(folder / "tokenizer")
    write_rows(
        folder / "rows.jsonl", [chat(f"Hi {number}", f"there {number}") for number in range(8)]
    )
    return folder


def with_value(tables: dict[str, Any], table: str, key: str, value: Any) -> dict[str, Any]:
    if table == "sources":
        return {**tables, "sources": [{**tables["sources"][0], key: value}]}
    return {**tables, table: {key: value}} if table else {**tables, key: value}


@pytest.mark.parametrize(("table", "key"), [pair for pair in KEYS if pair not in NOT_HERE])
def test_any_value_of_a_key_is_an_error_of_ours_or_builds(
    table: str, key: str, folder: Path, tmp_path: Path
) -> None:
    tables = mixture_of([folder / "rows.jsonl"], folder / "tokenizer")
    for index, value in enumerate(VALUES):
        bent = with_value(tables, table, key, value)
        with contextlib.suppress(SftError):
            build_set(bent, tmp_path / f"out{index}", store=folder / "samples")


SKIP = {"rows": {"on_error": "skip", "reject_budget": 1.0}}
BAD = '{"messages":[{"role":"user","content":"a","content":"b"}]}'


@pytest.mark.parametrize(
    ("line", "tables", "code"),
    [
        (BAD, {}, 4),
        (BAD, SKIP, 0),
        ('{"messages":%s}' % ("[" * 250 + "]" * 250), {}, 4),
        ('{"messages":%s}' % ("[" * 9000 + "]" * 9000), SKIP, 0),
        ("9" * 5000, SKIP, 0),
        (BAD, {"rows": {"on_error": 7}}, 3),
        (BAD, {"max_seq_len": 10**30}, 3),
    ],
)
def test_a_bad_row_ends_the_command_with_its_code(
    line: str,
    tables: dict[str, Any],
    code: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_rows(tmp_path / "bad.jsonl", [chat("Hi", "there"), line])
    file = write_toml(tmp_path / "mix.toml", mixture_of([rows], folder / "tokenizer", **tables))
    places = ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    monkeypatch.setattr(
        "sys.argv", ["sft-prep", "build", "--mixture", str(file), *places, "--workers", "1"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert (ended.value.code or 0) == code, printed
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rows.max_uncarried=0.5", "'rows.max_uncarried' is now called 'rows.max_unrendered'"),
        (
            "sources.0.part_epochs={}",
            "'sources.0.part_epochs' is now called 'sources.0.group_epochs'",
        ),
    ],
)
def test_a_key_of_an_older_release_is_an_error_that_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(SftError, match=new):
        mixture_config.load_mixture("demo", (old,))


@pytest.mark.parametrize(
    "date", ["2024-02-30", "20240229", "2024-W01-1", "2024-1-1", "today", "2024-02-29T00:00"]
)
def test_a_date_that_does_not_exist_is_refused(date: str) -> None:
    with pytest.raises(SftError, match="expected a day as YYYY-MM-DD"):
        mixture_config.TemplateConfig(name="chatml", date=date)
    mixture_config.TemplateConfig(name="chatml", date="2024-02-29")
