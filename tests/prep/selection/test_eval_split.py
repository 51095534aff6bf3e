"""Holding out: every row of a prompt on one side, all rows on one of them, the same side under
every other setting."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_builds import build_set, chat, mixture_of, plan_of, small_tokenizer, write_rows

from prep.build.build import build
from prep.build.dry_run import dry_run
from prep.build.explain import explain
from prep.build.summary import summary_lines
from prep.inspection.stats import stats, stats_lines
from prep.inspection.verification.verify import verify
from prep.selection.eval_split import is_held_out
from shared.errors import ArtifactError, ConfigError, IncompleteArtifactError
from shared.shard_format import EVAL_DIR
from shared.shard_reader import ShardSet, open_shard_set, read_manifest


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def asked_again(number: int, seed: int) -> list[dict[str, Any]]:
    """Return rows in which about every question comes three times, with other answers and further
    turns."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        question = f"What is {draw.randrange(number // 3)} + 2?"
        further = [f"The answer is {draw.random()}.", *["thanks", "bye"] * draw.randint(0, 1)]
        rows.append(chat(question, *further, system="Be nice." if draw.random() < 0.5 else ""))
    return rows


@pytest.fixture
def tables(tokenizer: Path, tmp_path: Path) -> dict[str, Any]:
    """Two sources that share most of their questions; a quarter of the prompts is held out."""
    first = write_rows(tmp_path / "first.jsonl", asked_again(400, 1))
    second = write_rows(tmp_path / "second.jsonl", asked_again(300, 2))
    return {**mixture_of([first, second], tokenizer), "eval": {"fraction": 0.25}}


def rows_of(shards: ShardSet) -> set[tuple[int, int]]:
    return {
        (source, row) for shard in shards.shards for source, row, _ in shard["seq_origin"].tolist()
    }


def sides(shards: ShardSet) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    return rows_of(shards), rows_of(open_shard_set(shards.path / EVAL_DIR))


def prompt_of(tables: dict[str, Any], row: tuple[int, int]) -> str:
    lines = Path(tables["sources"][row[0]]["path"]).read_text().splitlines()
    messages = json.loads(lines[row[1]])["messages"]
    return json.dumps(messages[: 1 + (messages[0]["role"] == "system")])


def test_every_row_is_on_one_side_and_no_prompt_is_on_both(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    train, held_out = sides(build_set(tables, tmp_path / "out"))
    assert train | held_out == {(0, row) for row in range(400)} | {(1, row) for row in range(300)}
    assert not train & held_out
    prompts = [{prompt_of(tables, row) for row in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) < len(held_out)  # some prompts have several rows
    assert {source for source, _ in held_out} == {0, 1}


@given(st.integers(0, 2**63), st.floats(0.0, 0.99))
@settings(max_examples=50, deadline=None)
def test_the_share_is_the_fraction_and_a_larger_one_holds_the_same_out(
    seed: int, fraction: float
) -> None:
    prompts = np.random.default_rng(7).integers(0, 2**64, 20_000, np.uint64)
    which = is_held_out(prompts, fraction=fraction, seed=seed)
    assert abs(which.mean() - fraction) < 0.02  # 5.6 standard deviations at a half
    assert (
        which[which].sum()
        == (which & is_held_out(prompts, fraction=fraction + 0.009, seed=seed)).sum()
    )


def test_another_seed_holds_other_prompts_out(tables: dict[str, Any], tmp_path: Path) -> None:
    _, held_out = sides(build_set(tables, tmp_path / "out"))
    _, others = sides(build_set({**tables, "seed": 1}, tmp_path / "other"))
    assert held_out - others
    assert others - held_out


def test_workers_do_not_change_a_byte(tables: dict[str, Any], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    build_set(tables, one, store=tmp_path / "s1", workers=1)
    build_set(tables, two, store=tmp_path / "s2", workers=2)
    files = {path.relative_to(one) for path in one.rglob("*") if path.is_file()} - {
        Path("build_info.json")
    }
    assert Path("eval/shards/00000/tokens.npy") in files
    assert [file for file in files if (one / file).read_bytes() != (two / file).read_bytes()] == []


def mix(tables: dict[str, Any]) -> None:
    tables["sources"][0]["fraction"] = 0.3
    tables["sources"][1]["epochs"] = 2.5


def temperature(tables: dict[str, Any]) -> None:
    tables["mixing"] = {"temperature": 3.0}


@pytest.mark.parametrize("change", [mix, temperature])
def test_another_mix_leaves_the_eval_set_as_it_is(
    change: Callable[[dict[str, Any]], None], tables: dict[str, Any], tmp_path: Path
) -> None:
    before = build_set(tables, tmp_path / "before")
    _, held_out = sides(before)
    change(tables)
    after = build_set(tables, tmp_path / "after")
    train, same = sides(after)
    assert same == held_out
    assert not train & held_out
    assert after.manifest.fingerprint != before.manifest.fingerprint
    assert (
        read_manifest(after.path / EVAL_DIR).fingerprint
        == read_manifest(before.path / EVAL_DIR).fingerprint
    )
    verify(after.path)


def shorter(tables: dict[str, Any]) -> None:
    tables["max_seq_len"] = 48


def other_template(tables: dict[str, Any]) -> None:
    tables["template"] = {"name": "tulu"}


def swapped(tables: dict[str, Any]) -> None:
    tables["sources"].reverse()


@pytest.mark.parametrize("change", [shorter, other_template, swapped])
def test_no_other_setting_moves_a_prompt_to_the_other_side(
    change: Callable[[dict[str, Any]], None], tables: dict[str, Any], tmp_path: Path
) -> None:
    train, held_out = sides(build_set(tables, tmp_path / "before"))
    known = [{prompt_of(tables, row) for row in side} for side in (train, held_out)]
    change(tables)
    for side, before in zip(sides(build_set(tables, tmp_path / "after")), known, strict=True):
        assert {prompt_of(tables, row) for row in side} <= before


def test_every_row_is_accounted_for_on_both_sides(tables: dict[str, Any], tmp_path: Path) -> None:
    tables["sources"][0]["rows"] = 100
    shards = build_set(tables, tmp_path / "out")
    held_out = read_manifest(shards.path / EVAL_DIR)
    for train, evaluation in zip(shards.manifest.sources, held_out.sources, strict=True):
        for source in (train, evaluation):
            assert source.rows_read == source.rows_used + sum(source.rows_dropped.values())
        assert train.rows_dropped["held_out"] == evaluation.rows_used > 0
    assert shards.manifest.sources[0].rows_dropped["not_chosen"] > 0
    summary = "\n".join(summary_lines(shards.manifest, shards.path))
    assert f"left out (held_out) {held_out.sources[0].rows_used}" in summary
    assert held_out.fingerprint in summary


def test_stats_and_a_dry_run_say_what_is_held_out(tables: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(tables, tmp_path / "out")
    lines = dry_run(plan)
    assert not (tmp_path / "out").exists()
    shards = build_set(tables, tmp_path / "out")
    totals = read_manifest(shards.path / EVAL_DIR).totals
    size = (
        f"{totals.packs:,} packs of 128, {totals.sequences:,} sequences, {totals.tokens:,} tokens"
    )
    assert sum(size in line for line in lines) == 1
    numbers = stats(shards)["held_out"]
    assert (numbers["packs"], numbers["loss_tokens"]) == (totals.packs, totals.loss_tokens)
    assert sum(numbers["rows_used"].values()) == totals.sequences
    assert any(
        line.startswith(f"held out in eval/: {totals.packs:,} packs")
        for line in stats_lines(shards)
    )


def test_a_set_without_a_fraction_has_the_inputs_it_had_before_there_was_one(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    del tables["eval"]
    shards = build_set(tables, tmp_path / "out")
    assert "eval" not in shards.manifest.config
    assert not (shards.path / EVAL_DIR).exists()
    assert stats(shards)["held_out"] is None
    build(plan_of({**tables, "eval": {"fraction": 0.0}}, shards.path), rebuild=False)  # up to date
    plan = plan_of({**tables, "eval": {"fraction": 0.1}}, shards.path)
    with pytest.raises(ArtifactError, match=r"config\.eval: absent -> "):
        build(plan, rebuild=False)
    assert any("config.eval" in line for line in explain(plan))


def test_a_rebuild_without_a_fraction_leaves_no_eval_set(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    build_set(tables, tmp_path / "out")
    del tables["eval"]
    assert not (build_set(tables, tmp_path / "out", rebuild=True).path / EVAL_DIR).exists()


def test_an_eval_set_that_was_removed_is_missed(tables: dict[str, Any], tmp_path: Path) -> None:
    shards = build_set(tables, tmp_path / "out")
    shutil.rmtree(shards.path / EVAL_DIR)
    with pytest.raises(IncompleteArtifactError, match="eval"):
        build(plan_of(tables, shards.path), rebuild=False)
    with pytest.raises(IncompleteArtifactError, match="eval"):
        verify(shards.path)


def test_a_fraction_that_holds_nothing_out_is_reported(
    tables: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables["eval"]["fraction"] = 1e-9
    shards = build_set(tables, tmp_path / "out")
    assert "eval.fraction = 1e-09 holds none of the prompts of first, second out" in caplog.text
    assert not (shards.path / EVAL_DIR).exists()
    verify(shards.path)
    build(plan_of(tables, shards.path), rebuild=False)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0])
def test_a_fraction_that_is_none_is_refused(
    fraction: float, tables: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="less than 1"):
        plan_of({**tables, "eval": {"fraction": fraction}}, tmp_path / "out")


def test_the_shares_of_prompts_and_rows_are_logged_and_a_warning_where_they_are_far(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", [chat(f"q {number % 40}", f"a {number}") for number in range(200)]
    )
    tables = mixture_of([path], tokenizer, eval={"fraction": 0.5}, seed=1)
    caplog.set_level("INFO")
    shards = build_set(tables, tmp_path / "out")
    (record,) = [record for record in caplog.records if "holds out" in record.message]
    assert " of 40 prompts (" in record.message
    assert " of 200 rows (" in record.message
    assert any("usable rows (" in line for line in summary_lines(shards.manifest, shards.path))
    caplog.clear()
    build_set({**tables, "eval": {"fraction": 0.04}, "seed": 3}, tmp_path / "few")
    few = [record for record in caplog.records if "eval.fraction = 0.04" in record.message]
    assert [record.levelname for record in few] == ["WARNING"]
