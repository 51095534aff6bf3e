"""The summary of a build: every row that was left out is counted, by its reason."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows

from prep.build.summary import summary_lines
from shared.shard_format import OTHER_GROUPS, Manifest
from shared.shard_reader import read_manifest


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("summary")
    rows = write_rows(folder / "rows.jsonl", [chat(f"q {n}", f"a {n}") for n in range(40)])
    tokenizer = small_tokenizer(folder / "small")
    return build_set(mixture_of([rows], tokenizer, eval={"fraction": 0.3}), folder / "set").path


COUNTS = st.dictionaries(
    st.sampled_from(["one", "two words", "three_words"]), st.integers(1, 10**6)
)


@settings(max_examples=100, deadline=None)
@given(
    rejected=COUNTS,
    unrendered=COUNTS,
    dropped=COUNTS,
    truncated=st.integers(0, 9),
    unterminated=st.integers(0, 9),
    others=st.integers(0, 9),
)
def test_each_reason_is_named_once_with_its_count(
    rejected: dict[str, int],
    unrendered: dict[str, int],
    dropped: dict[str, int],
    truncated: int,
    unterminated: int,
    others: int,
    out: Path,
) -> None:
    manifest = read_manifest(out)
    (source,) = manifest.sources
    source = dataclasses.replace(
        source,
        rows_rejected=rejected,
        rows_unrendered=unrendered,
        rows_dropped={**dropped, OTHER_GROUPS: others},
        rows_truncated=truncated,
        rows_without_terminator=unterminated,
    )
    changed: Manifest = dataclasses.replace(manifest, sources=(source,))
    line = summary_lines(changed, out)[2]
    expected = [
        *((f"rejected ({reason})", count) for reason, count in rejected.items()),
        *((f"unrendered ({reason})", count) for reason, count in unrendered.items()),
        *((f"left out ({reason})", count) for reason, count in dropped.items()),
        *([("truncated", truncated)] if truncated else []),
        *([("without terminator", unterminated)] if unterminated else []),
    ]
    notes = [note.rpartition(" ") for note in re.split("; ", line)[1:]]
    assert [(what, int(count.replace(",", ""))) for what, _, count in notes] == expected


def test_the_eval_set_follows_with_its_share_of_the_usable_rows(out: Path) -> None:
    manifest, evaluation = read_manifest(out), read_manifest(out / "eval")
    lines = summary_lines(manifest, out)
    rows = evaluation.sources[0].rows_used
    assert lines[-4].startswith(
        f"held out by eval.fraction = 0.3 of the prompts: {rows} of 40 usable rows"
        f" ({rows / 40:.1%})"
    )
    assert lines[-3:] == summary_lines(evaluation, out / "eval")
    assert len(lines) == 3 + 1 + 3
