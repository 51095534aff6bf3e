"""A source that is split by a column: the same tokens in the same packs, and every row
accounted for in its group."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_builds import build_set, chat, mixture_of, plan_of, small_tokenizer, write_rows

import prep.selection.split_sources
from prep.build.dry_run import dry_run
from prep.inspection.locate import locate_sequences
from prep.inspection.stats import stats, stats_lines
from prep.inspection.verification.verify import verify
from prep.sharing.dataset_card import render_set_card
from prep.sharing.wire_format import contents_of_set
from shared.errors import ConfigError, DataError, SftError
from shared.shard_format import OTHER_GROUPS, SourceEntry
from shared.shard_reader import ShardSet, open_shard_set

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


def rows_of(values: list[Any], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of uneven lengths, one with each value in its column `origin`; None: without the
    column."""
    draw = random.Random(seed)
    rows = []
    for number, value in enumerate(values):
        row = chat(
            f"no {number}", " ".join(draw.choices(WORDS, k=draw.randint(1, 30) if number else 1))
        )
        rows.append(row if value is None else {**row, "origin": value})
    return rows


def split_source(path: Path, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "split_by": "origin", **more}


def by_name(shard_set: ShardSet) -> dict[str, SourceEntry]:
    return {source.name: source for source in shard_set.manifest.sources}


def rows_in(shard_set: ShardSet) -> dict[str, set[int]]:
    """Return the row numbers that each source has in the set."""
    origin = np.concatenate([shard["seq_origin"] for shard in shard_set.shards])
    return {
        source.name: set(origin[origin[:, 0] == index, 1].tolist())
        for index, source in enumerate(shard_set.manifest.sources)
    }


def accounts_for_all(source: SourceEntry) -> bool:
    dropped = {
        reason: count
        for reason, count in source.rows_dropped.items()
        if not reason.startswith("fragments")
    }
    lost = [*source.rows_rejected.values(), *source.rows_unrendered.values(), *dropped.values()]
    return source.rows_read == source.rows_used + sum(lost)


@settings(max_examples=12, deadline=None)
@given(
    values=st.lists(st.sampled_from(["a", "b/c", "Ünïcode $x$", "", None, 7]), max_size=60).map(
        lambda v: ["a", *v]
    ),
    over_length=st.sampled_from(["truncate", "drop", "split"]),
    exact=st.booleans(),
    seed=st.integers(0, 3),
)
def test_a_split_moves_no_token_and_accounts_for_every_row(
    values: list[Any],
    over_length: str,
    exact: bool,
    seed: int,
    tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    place = tmp_path_factory.mktemp("split")
    values = [*values, "Z", "A"]
    rows = rows_of(values, seed=seed)
    rows[-1]["messages"] = rows[-2]["messages"]  # a duplicate in the group before
    file = write_rows(place / "rows.jsonl", rows)
    more = {"max_seq_len": 48, "lengths": {"over_length": over_length}, "dedup": {"exact": exact}}
    whole = build_set(mixture_of([file], tokenizer, **more), place / "whole")
    split = build_set(mixture_of([split_source(file)], tokenizer, **more), place / "split")
    verify(split.path)
    for one, other in zip(whole.shards, split.shards, strict=True):
        for name in (
            "tokens",
            "loss_mask",
            "kind",
            "seq_offsets",
            "pack_offsets",
            "pack_loss_tokens",
        ):
            np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_array_equal(one["seq_origin"][:, 1:], other["seq_origin"][:, 1:])
    names = {str(value) if value not in ("", None) else "rows" for value in values}
    assert set(by_name(split)) == names
    for name, source in by_name(split).items():
        expected_rows = {
            row
            for row, value in enumerate(values)
            if (str(value) if value not in ("", None) else "rows") == name
        }
        assert rows_in(split)[name] <= expected_rows
        assert (source.own_rows, source.rows_read) == (len(expected_rows), len(values))
        assert accounts_for_all(source)
    (entry,) = whole.manifest.sources
    for count in (
        "rows_used",
        "rows_truncated",
        "rows_without_terminator",
        "tokens",
        "loss_tokens",
    ):
        assert sum(getattr(source, count) for source in split.manifest.sources) == getattr(
            entry, count
        )


def test_neither_workers_nor_stores_change_a_split(tokenizer: Path, tmp_path: Path) -> None:
    values = [
        "late" if number > 8500 else f"part {number % 7 // (1 + number // 5000)}"
        for number in range(9000)
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows_of(values))
    tables = mixture_of([split_source(file)], tokenizer)
    one = build_set(tables, tmp_path / "one", store=tmp_path / "a", workers=1)
    two = build_set(tables, tmp_path / "two", store=tmp_path / "b", workers=2)
    assert (tmp_path / "one/manifest.json").read_bytes() == (
        tmp_path / "two/manifest.json"
    ).read_bytes()
    again = build_set(
        tables, tmp_path / "three", store=tmp_path / "b"
    )  # from the samples of the second
    assert one.manifest.fingerprint == two.manifest.fingerprint == again.manifest.fingerprint
    for name, rows in rows_in(one).items():  # chunks that know other groups, or others first
        assert rows == {number for number, value in enumerate(values) if value == name}


def test_a_parquet_file_is_split_alike(tokenizer: Path, tmp_path: Path) -> None:
    rows = rows_of(["b", "a", "a", None, "b"])
    lines = build_set(
        mixture_of([split_source(write_rows(tmp_path / "x.jsonl", rows))], tokenizer),
        tmp_path / "lines",
    )
    pq.write_table(
        pa.Table.from_pylist([{"origin": None, **row} for row in rows]), tmp_path / "x.parquet"
    )
    table = build_set(
        mixture_of([split_source(tmp_path / "x.parquet")], tokenizer), tmp_path / "table"
    )
    assert rows_in(lines) == rows_in(table) == {"x": {3}, "a": {1, 2}, "b": {0, 4}}


def test_bad_rows_are_counted_where_they_belong(tokenizer: Path, tmp_path: Path) -> None:
    rows: list[Any] = rows_of(["a", "b", "a", "b"])
    rows[2]["messages"] = []
    rows += [
        "{broken",
        {**chat("hi", "ho"), "origin": ["a"]},
        {**chat("hi", "ho"), "origin": "two\nlines"},
    ]
    rows += [{**chat("hi", "ho"), "origin": 201 * "x"}, {**chat("hi", "ho"), "origin": True}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    policy = {"on_error": "skip", "reject_budget": 1.0}
    split = build_set(mixture_of([split_source(file)], tokenizer, rows=policy), tmp_path / "out")
    assert {name: source.rows_rejected for name, source in by_name(split).items()} == {
        "rows": {"malformed": 5}, "a": {"malformed": 1}, "b": {}
    }  # fmt: skip
    assert all(accounts_for_all(source) for source in split.manifest.sources)
    with pytest.raises(
        ConfigError, match=r"rows:5.*malformed: .*origin is \['a'\]; expected a name of at most 200"
    ):
        locate_sequences(split, row="rows:5")


def test_each_group_is_mixed_as_a_source(tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows_of(["many"] * 60 + ["few"] * 12))
    half = build_set(mixture_of([split_source(file, fraction=0.5)], tokenizer), tmp_path / "half")
    assert {name: source.rows_used for name, source in by_name(half).items()} == {
        "many": 30,
        "few": 6,
    }
    twice = build_set(mixture_of([split_source(file, epochs=2.0)], tokenizer), tmp_path / "twice")
    verify(twice.path)
    assert twice.manifest.totals.sequences == 144
    flat = build_set(
        mixture_of([split_source(file)], tokenizer, mixing={"temperature": 1000.0}),
        tmp_path / "flat",
    )
    tokens = [source.tokens for source in flat.manifest.sources]
    assert max(tokens) < 1.2 * min(tokens)
    verify(flat.path)


def test_single_groups_are_left_out_thinned_and_repeated(tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows_of(["a.1/x", "b", "c", "d", None] * 20))
    times = {"a.1/x": 0, "b": 0.5, "c": 2.25, "": 1}
    tables = mixture_of(
        [split_source(file, fraction=0.25, group_epochs=times)], tokenizer, eval={"fraction": 0.2}
    )
    split = build_set(tables, tmp_path / "out")
    usable = {
        name: source.own_rows - source.rows_dropped["held_out"]
        for name, source in by_name(split).items()
    }
    origin = np.concatenate([shard["seq_origin"] for shard in split.shards])
    sequences = np.bincount(origin[:, 0], minlength=5).tolist()  # rows, a.1/x, b, c, d
    shares = {"rows": 1, "a.1/x": 0, "b": 0.5, "c": 2.25, "d": 0.25}
    assert sequences == [round(shares[name] * count) for name, count in usable.items()]
    assert by_name(split)["a.1/x"].rows_dropped["not_chosen"] == usable["a.1/x"]
    assert all(accounts_for_all(source) for source in split.manifest.sources)
    verify(split.path)
    held_out = open_shard_set(split.path / "eval").manifest
    assert all(
        source.rows_used == 20 - usable[source.name] for source in held_out.sources
    )  # whatever the mix


def test_a_whole_source_may_be_left_out(tokenizer: Path, tmp_path: Path) -> None:
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", rows_of([None] * 3, seed=ord(name))) for name in "xy"
    ]
    sources = [
        {"path": str(path), "epochs": epochs} for path, epochs in zip(paths, (0, 1), strict=True)
    ]
    out = build_set(mixture_of(sources, tokenizer), tmp_path / "out")
    assert rows_in(out) == {"x": set(), "y": {0, 1, 2}}
    assert by_name(out)["x"].rows_dropped == {"not_chosen": 3}
    verify(out.path)
    with pytest.raises(ConfigError, match=r"epochs = -1\.0; expected 0"):
        build_set(mixture_of([{**sources[0], "epochs": -1}], tokenizer), tmp_path / "refused")


def test_what_is_held_out_is_split_too(tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows_of(["a", "b", "c"] * 60))
    whole = build_set(mixture_of([file], tokenizer, eval={"fraction": 0.2}), tmp_path / "whole")
    split = build_set(
        mixture_of([split_source(file)], tokenizer, eval={"fraction": 0.2}), tmp_path / "split"
    )
    for part in ("", "eval"):
        one, other = (open_shard_set(shard_set.path / part) for shard_set in (whole, split))
        assert set().union(*rows_in(one).values()) == set().union(*rows_in(other).values())
        assert [source.name for source in other.manifest.sources] == ["a", "b", "c"]
        assert all(accounts_for_all(source) for source in other.manifest.sources)
        verify(other.path)


def test_of_duplicates_in_two_groups_the_first_row_stays(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{**chat("hi", "ho"), "origin": "b"}, {**chat("hi", "ho"), "origin": "a"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    split = build_set(
        mixture_of([split_source(file)], tokenizer, dedup={"exact": True}), tmp_path / "out"
    )
    assert rows_in(split) == {"a": set(), "b": {0}}
    assert by_name(split)["a"].rows_dropped == {OTHER_GROUPS: 1, "duplicate": 1}
    with pytest.raises(ConfigError, match="duplicate: the same as row 0 of rows"):
        locate_sequences(split, row="a:1")


@pytest.mark.parametrize(
    ("values", "source", "message"),
    [
        ([None, ""], {}, "none of its 2 rows has a value in the column 'origin'; correct split_by"),
        (
            [f"id {n}" for n in range(30)],
            {},
            "the column 'origin' has more than 20 values in its first 30 rows",
        ),
        (["a"], {"rows": 3}, "rows = 3 and split_by = 'origin' are both set"),
        (
            ["a"],
            {"group_epochs": {"b": 2}},
            "group_epochs names 'b', which no row has in the column 'origin'; it has",
        ),
        (["a"], {"group_epochs": {"a": -1}}, "group_epochs: 'a' = -1.0; expected 0"),
        (["a"], {"group_epochs": {"a": float("nan")}}, "group_epochs.a = nan; expected a finite"),
        (["a"], {"group_epochs": {"a": 2}, "split_by": ""}, "group_epochs is set but not split_by"),
        (
            ["other"],
            {},
            "split_by gives two sources of the set the name 'other'; set `name`",
        ),
    ],
)
def test_a_split_that_cannot_be_is_refused(
    values: list[Any], source: dict[str, Any], message: str, tokenizer: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(prep.selection.split_sources, "MAX_GROUPS", 20)
    file = write_rows(tmp_path / "rows.jsonl", rows_of(values))
    other = write_rows(tmp_path / "other.jsonl", rows_of([None]))
    with pytest.raises(SftError, match=message) as caught:
        build_set(
            mixture_of([split_source(file, **source), {"path": str(other)}], tokenizer),
            tmp_path / "out",
        )
    assert isinstance(caught.value, DataError | ConfigError)
    assert not (tmp_path / "out").exists()


def test_a_column_may_begin_late(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows_of([None] * 4100 + ["a"]))
    split = build_set(mixture_of([split_source(file)], tokenizer), tmp_path / "out")
    assert {name: source.own_rows for name, source in by_name(split).items()} == {
        "rows": 4100,
        "a": 1,
    }
    assert (
        "rows: none of its first 4096 rows has a value in the column 'origin' that split_by names"
        in caplog.text
    )


def test_a_group_of_which_nothing_is_chosen_is_reported(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows_of(["many"] * 20 + ["few", "none"]))
    build_set(
        mixture_of([split_source(file, fraction=0.25, group_epochs={"none": 0})], tokenizer),
        tmp_path / "out",
    )
    messages = [
        record.getMessage() for record in caplog.records if "is chosen" in record.getMessage()
    ]
    assert messages == ["few: not one of its 1 eligible sequences is chosen"]


def test_a_source_of_broken_rows_alone_is_as_without_a_split(
    tokenizer: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ["{broken"])
    other = write_rows(tmp_path / "other.jsonl", rows_of([None]))
    policy = {"on_error": "skip", "reject_budget": 1.0}
    tables = mixture_of([split_source(file), {"path": str(other)}], tokenizer, rows=policy)
    assert by_name(build_set(tables, tmp_path / "out"))["rows"].rows_rejected == {"malformed": 1}


def test_a_name_goes_before_the_groups(tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows_of(["a", "b", None]))
    sources = [split_source(file, name="x"), split_source(file, name="y")]
    split = build_set(mixture_of(sources, tokenizer), tmp_path / "out")
    assert list(by_name(split)) == ["x", "x/a", "x/b", "y", "y/a", "y/b"]
    assert len(list((tmp_path / "samples").glob("*/complete.json"))) == 1  # tokenised once


def test_reports_show_groups_and_not_the_rows_of_others(tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows_of(["a", "b|<b>[x](y)", "a"]))
    tables = mixture_of([split_source(file)], tokenizer)
    split = build_set(tables, tmp_path / "out")
    shown = "\n".join(stats_lines(split))
    assert OTHER_GROUPS not in shown
    keys = ("name", "group_of", "rows_read", "rows_dropped")
    assert [tuple(source[key] for key in keys) for source in stats(split)["sources"]] == [
        ("a", "rows", 2, {}),
        ("b|<b>[x](y)", "rows", 1, {}),
    ]
    lines = dry_run(plan_of(tables, tmp_path / "out"))
    assert "  a: 2 rows, 2 sequences; rejected 0, unrendered 0" in lines
    assert r"| b\|&lt;b>\[x\](y) of rows |" in render_set_card(contents_of_set(split.path)).decode()
    assert locate_sequences(split, row="a:2")
    with pytest.raises(
        ConfigError,
        match=r"no sequence .* it is in b\|<b>\[x\]\(y\), another group of rows: --row b\|<b>\[x\]",
    ):
        locate_sequences(split, row="a:1")
    with pytest.raises(
        ConfigError,
        match="rows 0 to 2, and this one was not chosen, or is of another group of rows",
    ):
        locate_sequences(split, row="a:9")


def test_a_mixture_without_a_split_has_the_inputs_it_had(tokenizer: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows_of(["a"]))
    manifest = build_set(mixture_of([file], tokenizer), tmp_path / "out").manifest
    assert "split_by" not in json.dumps(manifest.inputs)
    assert "group_of" not in manifest.sources[0].details
