"""Decontamination: which rows share a passage with a question, and that they are listed."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from prep_builds import build_set, chat, mixture_of, plan_of, small_tokenizer, write_rows

from prep.build.explain import explain
from prep.build.summary import summary_lines
from prep.selection.decontamination.ngrams import words_of
from shared.errors import DataError
from shared.shard_reader import ShardSet

QUESTION = "If Ann has 12 apples and gives Bob a third of them, how many are left?"  # 16 words


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def rejects(shards: ShardSet) -> list[dict[str, Any]]:
    text = zstandard.decompress((shards.path / "rejects.jsonl.zst").read_bytes()).decode()
    return [json.loads(line) for line in text.split("\n") if line]


def rows_used(shards: ShardSet) -> list[tuple[int, int]]:
    """Return (source, row) of every sequence, in order."""
    origin = np.concatenate([shard["seq_origin"] for shard in shards.shards])
    return sorted((int(source), int(row)) for source, row, _ in origin)


def contaminated(tmp_path: Path, tokenizer: Path, rows: list[Any], **settings: Any) -> ShardSet:
    questions = tmp_path / "heldout.jsonl"
    if not questions.exists():
        write_rows(questions, [chat(QUESTION, "8")])
    source = write_rows(tmp_path / "rows.jsonl", rows)
    tables = mixture_of(
        [source], tokenizer, max_seq_len=512, decontaminate={"files": [str(questions)], **settings}
    )
    return build_set(tables, tmp_path / "out", store=tmp_path / "store")


def test_a_row_that_shares_thirteen_words_with_a_question_leaves_and_is_listed(
    tmp_path: Path, tokenizer: Path
) -> None:
    words = words_of(QUESTION)
    rows = [
        chat("Hello", "there"),
        chat("So: " + " -- ".join(words[2:15]).upper() + "?!", "8"),  # 13 words, spelled otherwise
        chat(" ".join(words[2:14]), "8"),  # 12 words
        chat("What?", "He asked: " + QUESTION),  # said by the assistant
        chat(" ".join(words[:8]), " ".join(words[8:])),  # no passage crosses messages
    ]
    shards = contaminated(tmp_path, tokenizer, rows)
    assert rows_used(shards) == [(0, 0), (0, 2), (0, 4)]
    assert shards.manifest.sources[0].rows_dropped == {"contaminated": 2}
    listed = [(event["row"], event["reason"]) for event in rejects(shards)]
    assert listed == [(1, "contaminated"), (3, "contaminated")]
    assert "has 12 apples and gives" in rejects(shards)[0]["detail"]
    assert any(
        "left out (contaminated) 2" in line for line in summary_lines(shards.manifest, shards.path)
    )


def test_answers_of_the_held_out_file_are_no_questions(tmp_path: Path, tokenizer: Path) -> None:
    answer = "it is eight because a third of twelve is four and twelve less four is eight"
    write_rows(tmp_path / "heldout.jsonl", [chat(QUESTION, answer)])
    shards = contaminated(tmp_path, tokenizer, [chat("Why?", answer), chat("a", QUESTION)])
    assert rows_used(shards) == [(0, 0)]


def test_a_short_question_is_found_where_a_message_is_just_that(
    tmp_path: Path, tokenizer: Path
) -> None:
    short = "What is the capital of France?"
    write_rows(tmp_path / "heldout.jsonl", [chat(short, "Paris"), chat("Go on!", "No")])
    rows = [
        chat(short.lower(), "Paris"),
        chat(short + " And of Spain?", "Paris, Madrid"),
        chat("Go on!", "Yes"),
    ]
    assert rows_used(contaminated(tmp_path, tokenizer, rows)) == [(0, 1), (0, 2)]


def test_fields_name_the_columns_of_the_questions(tmp_path: Path, tokenizer: Path) -> None:
    write_rows(tmp_path / "heldout.jsonl", [{"problem": QUESTION, "answer": "8"}])
    rows = [chat(QUESTION, "8"), chat("a", "b")]
    with pytest.raises(
        DataError, match=r"heldout.jsonl line 1 \(row 0\): no messages.*decontaminate.fields"
    ):
        contaminated(tmp_path, tokenizer, rows)
    with pytest.raises(DataError, match="no text under question; it has problem, answer"):
        contaminated(tmp_path, tokenizer, rows, fields=["question"])
    assert rows_used(contaminated(tmp_path, tokenizer, rows, fields=["question", "problem"])) == [
        (0, 1)
    ]


def test_questions_without_a_word_in_common_use_stop_the_build(
    tmp_path: Path, tokenizer: Path
) -> None:
    write_rows(tmp_path / "heldout.jsonl", [chat("Go on!", "8")])
    with pytest.raises(DataError, match="1 questions in heldout, none of 6 words or more"):
        contaminated(tmp_path, tokenizer, [chat("a", "b")])


def test_decontaminating_costs_no_sample_and_is_an_input(tmp_path: Path, tokenizer: Path) -> None:
    rows = [chat("a", "b"), chat(QUESTION, "8")]
    plain = mixture_of([write_rows(tmp_path / "rows.jsonl", rows)], tokenizer)
    build_set(plain, tmp_path / "plain", store=tmp_path / "store")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").glob("*/chunk-*/*")}
    contaminated(tmp_path, tokenizer, rows)
    assert {
        file: file.stat().st_mtime_ns for file in (tmp_path / "store").glob("*/chunk-*/*")
    } == before
    write_rows(tmp_path / "heldout.jsonl", [chat(QUESTION + " And why?", "8")])
    tables = mixture_of(
        [tmp_path / "rows.jsonl"],
        tokenizer,
        max_seq_len=512,
        decontaminate={"files": [str(tmp_path / "heldout.jsonl")]},
    )
    assert any(
        line.startswith("questions.0.content_sha256: ")
        for line in explain(plan_of(tables, tmp_path / "out"))
    )


def test_no_path_of_a_held_out_file_is_in_the_manifest(tmp_path: Path, tokenizer: Path) -> None:
    shards = contaminated(tmp_path, tokenizer, [chat("a", "b")])
    assert shards.manifest.config["decontaminate"]["files"] == ["heldout"]
    assert str(tmp_path / "heldout") not in (shards.path / "manifest.json").read_text(
        encoding="utf-8"
    )


def test_overlaps_do_not_depend_on_the_workers(tmp_path: Path, tokenizer: Path) -> None:
    rows = [chat(f"{i} {QUESTION}" if i % 7 == 0 else f"row {i}", "answer") for i in range(5_000)]
    source, questions = (
        write_rows(tmp_path / "r.jsonl", rows),
        write_rows(tmp_path / "q.jsonl", [chat(QUESTION, "8")]),
    )
    tables = mixture_of([source], tokenizer, decontaminate={"files": [str(questions)]})
    one = build_set(tables, tmp_path / "one", store=tmp_path / "s1", workers=1)
    two = build_set(tables, tmp_path / "two", store=tmp_path / "s2", workers=2)
    assert one.manifest.sources[0].rows_dropped == {"contaminated": math.ceil(5_000 / 7)}
    assert (tmp_path / "one/manifest.json").read_bytes() == (
        tmp_path / "two/manifest.json"
    ).read_bytes()
    assert rejects(one) == rejects(two)
