"""Selecting for a build: rows that repeat a question are on neither side, whoever compares them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from prep_builds import chat, mixture_of, plan_of, small_tokenizer, write_rows

from prep.build.request import BuildRequest
from prep.build.select import select
from prep.build.tokenise import encoder_for, tokenise_sources
from prep.inputs import resolve_inputs
from prep.selection.mixture import Selections
from prep.tokenization.tokenizer import load_tokenizer

QUESTION = "If Ann has 12 apples and gives Bob a third of them, how many are left?"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def selections_of(request: BuildRequest) -> Selections:
    inputs = resolve_inputs(request.mixture, request.base, {})
    spec, _ = encoder_for(inputs, load_tokenizer(inputs.tokenizer))
    sources = tokenise_sources(inputs, spec, store=request.store, workers=1, scheduler="")
    return select(request, inputs, sources)


def rows_of(selections: Selections) -> list[set[int]]:
    return [
        {row for source in sources for row in source.selection.sequences["row"].tolist()}
        for sources in (selections.train, selections.held_out)
    ]


def test_rows_that_repeat_a_question_are_neither_trained_on_nor_held_out(
    tokenizer: Path, tmp_path: Path
) -> None:
    rows = [chat(f"{n}: {QUESTION if n % 5 == 0 else 'hello'}", "fish") for n in range(100)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    questions = write_rows(tmp_path / "questions.jsonl", [chat(QUESTION, "8")])
    tables: dict[str, Any] = mixture_of([file], tokenizer, eval={"fraction": 0.3})
    train, held_out = rows_of(selections_of(plan_of(tables, tmp_path / "out")))
    assert train | held_out == set(range(100))
    request = plan_of({**tables, "decontaminate": {"files": [str(questions)]}}, tmp_path / "out")
    contaminated = set(range(0, 100, 5))
    assert rows_of(selections_of(request)) == [train - contaminated, held_out - contaminated]
    # the rows are in the store now: nothing is compared again
    (stored,) = request.store.glob("overlap-*.json")
    before = stored.stat().st_mtime_ns
    again = selections_of(dataclasses.replace(request, workers=2))
    assert rows_of(again) == [train - contaminated, held_out - contaminated]
    assert stored.stat().st_mtime_ns == before
