"""Stats: the numbers are those of the columns, and the lines leave out no reason."""

import json
from pathlib import Path

from text_sets import write_rejected_row_set

from prep.inspection.stats import stats, stats_lines


def test_stats_count_what_the_columns_hold(tmp_path: Path) -> None:
    shard_set = write_rejected_row_set(tmp_path / "set")
    numbers = stats(shard_set)
    assert json.loads(json.dumps(numbers)) == numbers
    totals = [numbers[key] for key in ("packs", "sequences", "tokens", "loss_tokens")]
    assert totals == [4, 6, 28, 14]
    assert numbers["density"] == 28 / (4 * 16)
    assert numbers["kinds"]["assistant"] == {"tokens": 8, "loss_tokens": 8}
    assert numbers["kinds"]["user"] == {"tokens": 6, "loss_tokens": 0}
    assert sum(kind["tokens"] for kind in numbers["kinds"].values()) == 28
    assert numbers["sequence_length"]["p50"] == 5
    assert numbers["sequences_per_pack"] == {
        "mean": 1.5, "min": 1, "p5": 1, "p25": 1, "p50": 1, "p75": 2, "p95": 2, "p99": 2, "max": 2,
    }  # fmt: skip
    (source,) = numbers["sources"]
    assert (source["rows_read"], source["rows_used"], source["loss_share"]) == (8, 6, 1.0)


def test_stats_lines_name_every_reason_for_a_missing_row(tmp_path: Path) -> None:
    text = "\n".join(stats_lines(write_rejected_row_set(tmp_path / "set")))
    assert "4 packs of 16 in 2 shards" in text
    assert "chats: 1 rejected: malformed" in text
    assert "chats: 1 left out: over_length" in text
    assert "\x1b" not in text
