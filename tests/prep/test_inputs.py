"""Inputs: a digest of everything that decides a set, the same wherever the files lie."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prep_builds import build_set, chat, mixture_of, plan_of, small_tokenizer, write_rows

from prep.build.build import build
from prep.build.explain import explain
from prep.inputs import Inputs, difference_lines, resolve_inputs
from shared.errors import ConfigError

DATED = (
    "Today: {{ strftime_now('%d %B %Y') }}\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return small_tokenizer(tmp_path / "small")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "a.jsonl", [chat("Hi", "Yo"), chat("What is 2 + 2?", "4", "Sure?", "Yes")]
    )


def own_template(folder: Path, text: str) -> str:
    (folder / "mine.jinja").write_text(text, encoding="utf-8")
    return str(folder / "mine.jinja")


def inputs_of(tables: dict[str, Any], folder: Path) -> Inputs:
    request = plan_of(tables, folder / "out")
    return resolve_inputs(request.mixture, request.base, {})


CHANGES: dict[str, Any] = {
    "seed": 1,
    "max_seq_len": 64,
    "mask": {"boundary": "inside"},
    "lengths": {"over_length": "drop"},
    "rows": {"unknown": "error"},
    "eval": {"fraction": 0.1},
    "dedup": {"exact": True},
    "mixing": {"temperature": 2.0},
    "template": {"name": "chatml", "add_bos": True},
}


@pytest.mark.parametrize("table", CHANGES)
def test_any_setting_changes_the_digest_and_is_named(
    table: str, tokenizer: Path, rows: Path, tmp_path: Path
) -> None:
    tables = mixture_of([rows], tokenizer)
    before = inputs_of(tables, tmp_path)
    after = inputs_of({**tables, table: CHANGES[table]}, tmp_path)
    assert after.digest != before.digest
    first, *others = after.differences(before.tree)
    assert first.startswith(f"config.{table}")
    assert len(others) == (table == "template")  # BOS is part of the template's text


def test_the_same_bytes_elsewhere_have_the_same_digest_and_other_bytes_another(
    tokenizer: Path, rows: Path, tmp_path: Path
) -> None:
    here = inputs_of(mixture_of([rows], tokenizer), tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(tokenizer, moved / "small")
    shutil.copy(rows, moved)
    there = inputs_of(mixture_of([moved / "a.jsonl"], moved / "small"), tmp_path)
    assert there.tree == here.tree
    rows.write_text(rows.read_text().replace("Yo", "Ya"))
    changed = inputs_of(mixture_of([rows], tokenizer), tmp_path)
    assert [line.partition(":")[0] for line in changed.differences(here.tree)] == [
        "sources.a.content_sha256"
    ]


def test_how_rows_are_mixed_leaves_their_store_as_it_is(
    tokenizer: Path, rows: Path, tmp_path: Path
) -> None:
    from prep.conversations.formats import PLAIN_MESSAGES

    def store_of(**tables: Any) -> dict[str, Any]:
        inputs = inputs_of({**mixture_of([rows], tokenizer), **tables}, tmp_path)
        return inputs.store_inputs(inputs.sources[0], PLAIN_MESSAGES, "gigatoken")

    plain = store_of()
    for table, value in CHANGES.items():
        is_rendering = table == "template"
        assert (store_of(**{table: value}) != plain) == is_rendering, table
    assert store_of(rows={"unknown": "drop_message"}) != plain


@given(st.dictionaries(st.text(max_size=3), st.integers(), max_size=40), st.integers(0, 40))
def test_differences_are_listed_up_to_a_number_and_the_rest_is_counted(
    old: dict[str, int], num_changed: int
) -> None:
    changed = set(sorted(old)[:num_changed])
    new = {key: value + (key in changed) for key, value in old.items()}
    lines = difference_lines(old, new)
    assert len(lines) == min(len(changed), 21)
    if len(changed) > 20:
        assert lines[-1] == f"and {len(changed) - 20} more"


def test_two_sources_of_one_name_are_refused(tokenizer: Path, rows: Path, tmp_path: Path) -> None:
    tables = mixture_of([rows, rows], tokenizer)
    with pytest.raises(ConfigError, match="two sources are named 'a'"):
        build(plan_of(tables, tmp_path / "out"), rebuild=False)


def test_a_template_that_prints_the_date_keeps_that_of_the_first_build(
    tokenizer: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tables = mixture_of([rows], tokenizer, template=own_template(tmp_path, DATED))
    plan = plan_of(tables, tmp_path / "out")
    monkeypatch.setattr("prep.inputs.today", lambda: "2026-03-01")
    with caplog.at_level(logging.INFO):
        first = build(plan, rebuild=False)
    assert "prints the date: 2026-03-01 is used and recorded" in caplog.text
    assert first.config["template"]["date"] == "2026-03-01"
    monkeypatch.setattr("prep.inputs.today", lambda: "2026-03-02")
    caplog.clear()
    assert build(plan, rebuild=False) == first
    assert not caplog.records or "prints the date" not in caplog.text
    assert explain(plan)[0].endswith("every input is the same")
    assert build(plan, rebuild=True).fingerprint == first.fingerprint
    rehashed = build(dataclasses.replace(plan, rehash=True), rebuild=False)
    assert rehashed.fingerprint == first.fingerprint
    stated = {**tables, "template": {**tables["template"], "date": "2026-03-01"}}
    assert build(plan_of(stated, tmp_path / "out"), rebuild=False).fingerprint == first.fingerprint
    other = build_set(tables, tmp_path / "other").manifest
    assert other.config["template"]["date"] == "2026-03-02"
    assert other.fingerprint != first.fingerprint


def test_a_template_without_a_date_records_none(
    tokenizer: Path, rows: Path, tmp_path: Path
) -> None:
    manifest = build_set(mixture_of([rows], tokenizer), tmp_path / "out").manifest
    assert manifest.config["template"]["date"] == ""


def test_the_date_is_logged_once(
    tokenizer: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables: dict[str, Any] = mixture_of([rows], tokenizer, template=own_template(tmp_path, DATED))
    with caplog.at_level(logging.INFO):
        build_set(tables, tmp_path / "out")
    assert caplog.text.count("prints the date") == 1
