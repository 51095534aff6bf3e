"""Limits: which rows end a build, how many may be lost, and that an empty set is an error."""

import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows

from shared.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def listed(out: Path) -> list[dict[str, Any]]:
    data = zstandard.decompress((out / "rejects.jsonl.zst").read_bytes()).decode("utf-8")
    return [json.loads(line) for line in data.splitlines()]


def test_a_row_that_the_template_cannot_render_is_left_out_listed_or_refused(
    tokenizer: Path, tmp_path: Path
) -> None:
    tool = chat("Hi", "Yo")
    tool["messages"].insert(1, {"role": "tool", "content": "42"})
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a", "b"), tool])
    tables = mixture_of([rows], tokenizer, template="tulu")
    shards = build_set(tables, tmp_path / "out")
    assert shards.manifest.sources[0].rows_unrendered == {"tool message": 1}
    assert [(event["row"], event["detail"]) for event in listed(tmp_path / "out")] == [
        (1, "tool message")
    ]
    with pytest.raises(DataError, match=r"row 1.*tool message"):
        build_set({**tables, "rows": {"unknown": "error"}}, tmp_path / "error")
    with pytest.raises(DataError, match="max_unrendered"):
        build_set({**tables, "rows": {"max_unrendered": 0.4}}, tmp_path / "budget")
    source = build_set(
        {**tables, "rows": {"unknown": "drop_message"}}, tmp_path / "kept"
    ).manifest.sources[0]
    assert (source.rows_used, source.details["messages_dropped"]) == (2, 1)


def test_a_malformed_row_stops_the_build_or_is_skipped_within_the_budget(
    tokenizer: Path, tmp_path: Path
) -> None:
    good = [chat("a", "b")] * 9
    rows = write_rows(
        tmp_path / "rows.jsonl", [*good, '{"messages": [{"role": "bot", "content": "x"}]}']
    )
    tables = mixture_of([rows], tokenizer)
    with pytest.raises(DataError, match=r"rows\.jsonl line 10 \(row 9\).*'bot'.*on_error"):
        build_set(tables, tmp_path / "out")
    with pytest.raises(DataError, match="reject_budget"):
        build_set({**tables, "rows": {"on_error": "skip"}}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    policy = {"on_error": "skip", "reject_budget": 0.1}
    shards = build_set({**tables, "rows": policy}, tmp_path / "out")
    assert shards.manifest.sources[0].rows_rejected == {"malformed": 1}
    assert [event["row"] for event in listed(tmp_path / "out")] == [9]


@pytest.mark.parametrize(
    ("rows", "tables", "expected"),
    [
        ([], {}, r"no row of rows can be used \(there is none\)"),
        ([chat("Hi " * 300, "Yo")], {}, r"can be used \(few_loss_tokens 1\); look at the rows"),
        (
            ["{broken", chat("Hi " * 300, "Yo")],
            {"rows": {"on_error": "skip", "reject_budget": 1.0}},
            r"\(malformed 1, few_loss_tokens 1; the first: rows\.jsonl line 1 \(row 0\): ",
        ),
        ([chat("a", "b")], {"eval": {"fraction": 0.999999}}, "every prompt of rows is held out by"),
    ],
)
def test_a_set_without_a_row_is_an_error_that_counts_the_reasons(
    rows: list[Any], tables: dict[str, Any], expected: str, tokenizer: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=expected):
        build_set(mixture_of([file], tokenizer, **tables), tmp_path / "out")
    assert not (tmp_path / "out").exists()
