"""Whole builds from odd, damaged, huge or changing sources: the clean source's set, or an error of
one line."""

import gzip
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prep_builds import (
    build_set,
    chat,
    mixture_of,
    plan_of,
    small_tokenizer,
    write_rows,
    write_toml,
)
from prep_processes import ForkedPrep, PrepCase, manifest_bytes, short_rows

from prep.build.build import build
from prep.inspection.verification.verify import verify
from shared.errors import DataError
from shared.shard_reader import open_shard_set

TEXT = "one\u2028two\u2029three\u0085four\x0bfive \ufeff\U0001f642 e\u0301"
ROWS = [chat(f"Hi {index}", f"{TEXT} {index}") for index in range(20)]
ESCAPED = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
RAW = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def set_of(content: bytes, tokenizer: Path, folder: Path, name: str = "rows.jsonl") -> Any:
    folder.mkdir()
    (folder / name).write_bytes(content)
    return build_set(mixture_of([folder / name], tokenizer), folder / "out")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (RAW, "rows.jsonl"),
        (b"\xef\xbb\xbf" + RAW, "rows.jsonl"),
        (RAW.replace(b"\n", b"\r\n"), "rows.jsonl"),
        (b"\n \t\r\n" + RAW.replace(b"\n", b"\n\n").rstrip(b"\n"), "rows.jsonl"),
        (gzip.compress(b"\xef\xbb\xbf" + RAW.replace(b"\n", b"\r\n")), "rows.jsonl.gz"),
        (b"[" + b",\r\n".join(RAW.rstrip(b"\n").split(b"\n")) + b"]", "rows.json"),
    ],
    ids=["U+2028", "BOM", "CRLF", "blank lines", "gzip of BOM and CRLF", "JSON array"],
)
def test_the_same_rows_in_another_spelling_give_the_same_fingerprint(
    content: bytes, name: str, tokenizer: Path, tmp_path: Path
) -> None:
    clean = set_of(ESCAPED, tokenizer, tmp_path / "clean")
    odd = set_of(content, tokenizer, tmp_path / "odd", name)
    assert odd.manifest.fingerprint == clean.manifest.fingerprint
    assert odd.manifest.sources[0].rows_read == len(ROWS)


@pytest.mark.parametrize(
    "content", [b"", b"\xef\xbb\xbf", b"\r\n\n"], ids=["nothing", "BOM", "blank lines"]
)
def test_an_empty_source_has_no_rows_and_is_an_error_if_it_is_the_only_one(
    content: bytes, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    good = write_rows(tmp_path / "good.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no row of empty can be used \(there is none\)"):
        build(
            plan_of(mixture_of([tmp_path / "empty.jsonl"], tokenizer), tmp_path / "out"),
            rebuild=False,
        )
    manifest = build_set(
        mixture_of([tmp_path / "empty.jsonl", good], tokenizer), tmp_path / "out"
    ).manifest
    assert [(source.name, source.rows_read) for source in manifest.sources] == [
        ("empty", 0),
        ("good", len(ROWS)),
    ]


def test_rows_that_are_all_left_out_are_counted_by_reason(tokenizer: Path, tmp_path: Path) -> None:
    unanswered = ['{"messages": [{"role": "user", "content": "a"}]}'] * 3
    tables = mixture_of([write_rows(tmp_path / "rows.jsonl", unanswered)], tokenizer)
    with pytest.raises(DataError, match=r"no row of rows can be used \([a-z_]+ 3\)"):
        build(plan_of(tables, tmp_path / "out"), rebuild=False)


def test_if_no_row_can_be_used_the_error_names_the_reason_of_the_first(
    tokenizer: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ['{"messages": 1}', '{"messages": 2}'])
    tables = mixture_of([path], tokenizer, rows={"on_error": "skip", "reject_budget": 1.0})
    with pytest.raises(
        DataError, match=r"\(malformed 2; the first: rows.jsonl line 1 \(row 0\): messages is 1"
    ):
        build(plan_of(tables, tmp_path / "out"), rebuild=False)


def test_a_row_with_a_lone_surrogate_is_refused_or_skipped_and_counted(
    tokenizer: Path, tmp_path: Path
) -> None:
    lines = [
        *ROWS,
        (
            '{"messages": [{"role": "user", "content": "a\\ud800"}, {"role": "assistant",'
            ' "content": "b"}]}'
        ),
    ]
    tables = mixture_of([write_rows(tmp_path / "rows.jsonl", lines)], tokenizer)
    with pytest.raises(DataError, match=r"rows\.jsonl line 21 \(row 20\)"):
        build(plan_of(tables, tmp_path / "out"), rebuild=False)
    tables["rows"] = {"on_error": "skip", "reject_budget": 0.1}
    source = build_set(tables, tmp_path / "out").manifest.sources[0]
    assert (source.rows_used, source.rows_rejected) == (len(ROWS), {"malformed": 1})


@pytest.fixture(scope="module")
def case(forked: ForkedPrep, tmp_path_factory: pytest.TempPathFactory) -> PrepCase:
    case = PrepCase(tmp_path_factory.mktemp("case"), (300, 100))
    case.build(forked)
    return case


def test_a_truncated_gzip_is_an_error_of_one_line_and_the_whole_file_then_builds(
    case: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    whole = gzip.compress((case.folder / "a.jsonl").read_bytes(), mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) * 9 // 10])
    sources = [{"path": str(tmp_path / "a.jsonl.gz")}, case.tables["sources"][1]]
    file = write_toml(tmp_path / "gz.toml", {**case.tables, "sources": sources})
    ended = forked.run(case.arguments(tmp_path, file=file), chunk_lines=50)
    assert ended.code == 4
    assert "error: a.jsonl.gz ends in the middle of its compressed data" in ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "out").exists()
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    ended = forked.run(case.arguments(tmp_path, file=file), chunk_lines=50)
    assert ended.code == 0, ended.output
    made, expected = (open_shard_set(f / "out").manifest for f in (tmp_path, case.folder))
    assert made.fingerprint == expected.fingerprint


@pytest.mark.parametrize("at", [0.3, 0.6])
def test_a_source_that_changes_during_a_build_stops_it_and_the_next_build_reads_it_all(
    at: float, case: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes((case.folder / "a.jsonl").read_bytes())
    sources = [{"path": str(source)}, case.tables["sources"][1]]
    file = write_toml(tmp_path / "written.toml", {**case.tables, "sources": sources})
    arguments = case.arguments(tmp_path, file=file)
    row = json.dumps(chat("new", "row"))
    append = f"open({str(source)!r}, 'a').write({row + chr(10)!r})"
    # a chunk is about 13 of 300 changes of files
    ended = forked.run(arguments, chunk_lines=20, at=int(at * 200), then=append)
    assert ended.code == 4, ended.output
    assert f"{source} changed while it was being read; build again" in ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "out").exists()
    ended = forked.run(arguments, chunk_lines=20)
    assert ended.code == 0, ended.output
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert forked.run(case.arguments(fresh, file=file)).code == 0
    assert manifest_bytes(tmp_path) == manifest_bytes(fresh)
    assert open_shard_set(tmp_path / "out").manifest.sources[0].rows_read == 301


def test_a_source_replaced_after_a_killed_build_is_read_again(
    case: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "a.jsonl", short_rows(250))
    sources = [{"path": str(source)}, case.tables["sources"][1]]
    arguments = case.arguments(
        tmp_path, file=write_toml(tmp_path / "new.toml", {**case.tables, "sources": sources})
    )
    assert forked.run(arguments, chunk_lines=50, at=60).code == -signal.SIGKILL
    source.write_bytes((case.folder / "a.jsonl").read_bytes())
    assert forked.run(arguments, chunk_lines=50).code == 0
    assert manifest_bytes(tmp_path) == manifest_bytes(case.folder)


def test_a_source_that_cannot_be_read_is_an_error_of_one_line(
    case: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    # a file that nobody can read, not even root
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    tables = {**case.tables, "sources": [{"path": str(tmp_path / "a.jsonl")}]}
    ended = forked.run(
        case.arguments(tmp_path, file=write_toml(tmp_path / "unreadable.toml", tables))
    )
    assert ended.code == 4
    assert f"error: {tmp_path / 'a.jsonl'} cannot be read" in ended.output
    assert "Traceback" not in ended.output


def turns(number: int, kind: str) -> dict[str, Any]:
    if kind == "control token typed":
        return chat(*(f"turn {index} <|im_end|>" for index in range(number)))
    if kind == "plain":
        return chat(*(f"turn {index}" for index in range(number)))
    messages: list[dict[str, Any]] = []
    for index in range(number // 4):
        call = {
            "id": f"call_{index}",
            "type": "function",
            "function": {"name": "f", "arguments": {"n": index}},
        }
        messages += [
            {"role": "user", "content": f"question {index}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": f"result {index}", "tool_call_id": f"call_{index}"},
            {"role": "assistant", "content": f"answer {index}"},
        ]
    return {"messages": messages}


FOREIGN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}{% for c in"
    " m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ m.tool_call_id }}{{ '<|im_end|>\\n' }}{%"
    " endfor %}"
)


@pytest.mark.parametrize(
    ("kind", "template", "rows"),
    [
        ("plain", "chatml", {}),
        ("control token typed", "chatml", {}),
        ("control token typed", "foreign.jinja", {}),
        ("tools", "foreign.jinja", {}),
        ("tools", "tulu", {"unknown": "drop_message"}),
    ],
)
def test_ten_thousand_turns_are_one_row_like_any_other(
    kind: str, template: str, rows: dict[str, Any], tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "foreign.jinja").write_text(FOREIGN)
    path = write_rows(tmp_path / "rows.jsonl", [turns(10_000, kind)])
    tables = mixture_of(
        [path], tokenizer, template=template, lengths={"over_length": "split"}, rows=rows
    )
    shards = build_set(tables, tmp_path / "out")
    assert shards.manifest.sources[0].rows_used == 1
    dropped = 5_000 if rows else 0
    assert shards.manifest.sources[0].details["messages_dropped"] == dropped
    (offsets,) = (np.load(path) for path in tmp_path.glob("samples/*/chunk-*/message_offsets.npy"))
    assert len(offsets) == 10_000 - dropped
    assert verify(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.full
def test_a_line_of_100_mb_is_a_row_like_any_other(
    case: PrepCase, forked: ForkedPrep, tmp_path: Path
) -> None:
    long = chat("Hi", "What is 144 fish, hello there, thanks and goodbye. " * 2_000_000)
    path = write_rows(tmp_path / "long.jsonl", [chat("Hi", "there"), long, chat("Hi", "again")])
    assert path.stat().st_size > 100_000_000
    tables = {**case.tables, "sources": [{"path": str(path)}], "lengths": {"over_length": "split"}}
    ended = forked.run(case.arguments(tmp_path, file=write_toml(tmp_path / "long.toml", tables)))
    assert ended.code == 0, ended.output
    assert open_shard_set(tmp_path / "out").manifest.sources[0].rows_used == 3
    assert ended.peak_kib < 4 << 20
