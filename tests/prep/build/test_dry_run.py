"""A dry run: the numbers of the build that would follow, and no set."""

import re
from pathlib import Path
from typing import Any

import pytest
from prep_builds import build_set, chat, mixture_of, plan_of, small_tokenizer, write_rows

from prep.build.dry_run import dry_run
from shared.shard_reader import read_manifest


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture
def tables(tokenizer: Path, tmp_path: Path) -> dict[str, Any]:
    """Groups of one source, two of them with rows to reject or to leave out, and an eval set."""
    rows = [{**chat(f"q {n}", "a " * n), "origin": "xyz"[n % 3]} for n in range(60)]
    file = write_rows(tmp_path / "rows.jsonl", [*rows, "{broken"])
    return mixture_of(
        [{"path": str(file), "split_by": "origin", "fraction": 0.5}],
        tokenizer,
        max_seq_len=48,
        rows={"on_error": "skip", "reject_budget": 0.1},
        lengths={"over_length": "drop"},
        eval={"fraction": 0.2},
    )


def numbers_in(line: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def test_a_dry_run_prints_the_numbers_of_the_build_and_writes_no_set(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    lines = dry_run(plan_of(tables, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    manifest = build_set(tables, tmp_path / "out").manifest
    evaluation = read_manifest(tmp_path / "out" / "eval")
    expected = []
    for place, described in ((tmp_path / "out", manifest), (tmp_path / "out/eval", evaluation)):
        totals = described.totals
        expected.append(
            f"{place} would hold {totals.packs:,} packs of 48, {totals.sequences:,} sequences,"
            f" {totals.tokens:,} tokens, {totals.loss_tokens:,} loss tokens, density"
            f" {totals.density:.2%}"
        )
    assert [line.partition(", about")[0] for line in lines if " would hold " in line] == expected


def test_every_row_of_a_source_has_a_number_in_its_line(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    lines = dry_run(plan_of(tables, tmp_path / "out"))
    sources = build_set(tables, tmp_path / "out").manifest.sources
    assert [source.name for source in sources] == ["rows", "x", "y", "z"]
    for source, line in zip(sources, lines[1:], strict=False):
        rows, sequences, *left_out = numbers_in(line)
        assert line.startswith(f"  {source.name}: ")
        assert (rows, sequences) == (source.own_rows, source.rows_used)
        assert rows == sequences + sum(left_out)
