"""Decontamination: what a word and an n-gram are, which rows share one with a question, and that it
is said."""

import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_builds import build_set, chat, mixture_of, plan_of, small_tokenizer, write_rows

from prep.build.explain import explain
from prep.build.summary import summary_lines
from prep.selection.ngrams import GramSet, word_grams, words_of
from shared.errors import DataError
from shared.shard_reader import ShardSet

QUESTION = "If Ann has 12 apples and gives Bob a third of them, how many are left?"  # 16 words
TEXTS = st.text(
    alphabet=st.sampled_from("aAbB12 \n.,'-\u4eac\u30ab\u00e9\u0301\u0130\U00020000"), max_size=30
)


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


# words and n-grams


def slow_words(text: str) -> list[str]:
    words, inside = [], False
    for character in text.lower():
        if (
            "\u3040" <= character < "\u3100"
            or "\u3400" <= character < "\ua000"
            or character == "\U00020000"
        ):
            words.append(character)
            inside = False
        elif unicodedata.category(character)[0] in "LMN":
            words = [*words[:-1], words[-1] + character] if inside else [*words, character]
            inside = True
        else:
            inside = False
    return words


def slow_grams(texts: list[str], n: int) -> list[tuple[int, int, tuple[str, ...]]]:
    found = []
    for index, text in enumerate(texts):
        words = slow_words(text)
        if n // 2 <= len(words) < n and words:
            found.append((index, 0, tuple(words)))
        found += [(index, at, tuple(words[at : at + n])) for at in range(len(words) - n + 1)]
    return found


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6), n=st.integers(1, 5))
def test_grams_are_those_of_a_slow_reference_and_hash_apart(texts: list[str], n: int) -> None:
    found, expected = word_grams(texts, n), slow_grams(texts, n)
    assert list(zip(found.text.tolist(), found.word.tolist(), strict=True)) == [
        (t, w) for t, w, _ in expected
    ]
    hash_of = dict(zip((gram for *_, gram in expected), found.hashes.tolist(), strict=True))
    assert [
        hash_of[gram] for *_, gram in expected
    ] == found.hashes.tolist()  # equal grams, equal hashes
    assert len(set(hash_of.values())) == len(hash_of)  # and others, others
    assert [words_of(text) for text in texts] == [slow_words(text) for text in texts]


@pytest.mark.parametrize("text", ["word%d " * 3 % (1, 2, 3) * 90_000, "x" * 2_500_000])
def test_a_text_longer_than_a_block_has_the_grams_of_its_parts(text: str) -> None:
    found = word_grams([text, "a b c"], 3)
    if " " in text:
        assert len(found.hashes) == 3 * 90_000 - 2 + 1
        assert len(set(found.hashes[:-1].tolist())) == 3
    assert found.hashes[-1] == word_grams(["A, b: c!"], 3).hashes[0]


def test_hashes_are_the_same_on_every_machine() -> None:
    assert [f"{value:016x}" for value in word_grams(["Don't stop, 2 x 3!"], 4).hashes.tolist()] == [
        "12f2750948abe4c5", "4149821f44a4d77b", "9fe3691b636a894b",
    ]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    st.sets(st.integers(0, 2**64 - 1), max_size=30),
    st.lists(st.integers(0, 2**64 - 1), max_size=30),
)
def test_a_gram_set_contains_what_was_put_in(members: set[int], others: list[int]) -> None:
    asked = [
        *members,
        *others,
        *(value ^ (1 << 63) for value in members),
    ]  # these differ in the highest bit only
    found = GramSet(np.asarray(sorted(members), np.uint64)).contains(np.asarray(asked, np.uint64))
    assert found.tolist() == [value in members for value in asked]


# decontamination


def contaminated(
    tmp_path: Path, tokenizer: Path, rows: list[Any], *, out: str = "out", **asked: Any
) -> ShardSet:
    questions = tmp_path / "heldout.jsonl"
    if not questions.exists():
        write_rows(questions, [chat(QUESTION, "8")])
    source = write_rows(tmp_path / "rows.jsonl", rows)
    tables = mixture_of(
        [source], tokenizer, max_seq_len=512, decontaminate={"files": [str(questions)], **asked}
    )
    return build_set(
        tables, tmp_path / out, store=tmp_path / "store", workers=asked.pop("workers", 1)
    )


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
