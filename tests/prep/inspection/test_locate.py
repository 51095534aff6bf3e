"""Locating: a row is where the columns have it, and a row that is missing has a reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_sets import write_rejected_row_set

from prep.inspection.locate import locate_sequences, sequences_of
from shared.errors import ConfigError


def test_every_row_of_a_set_is_found_where_it_lies(tmp_path: Path) -> None:
    shard_set = write_rejected_row_set(tmp_path / "set")
    origins = np.concatenate([shard["seq_origin"] for shard in shard_set.shards])
    for row in origins[:, 1].tolist():
        ((pack, index),) = locate_sequences(shard_set, row=f"chats:{row}")
        assert [sequence.row for sequence in sequences_of(shard_set, pack)][index] == row


def test_a_row_that_was_left_out_has_the_reason_of_the_build(tmp_path: Path) -> None:
    shard_set = write_rejected_row_set(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"malformed: chats\.jsonl line 8 \(row 7\): no\\x1b"):
        locate_sequences(shard_set, row="chats:7")
    with pytest.raises(ConfigError, match="rows 0 to 7, and this one was not chosen"):
        locate_sequences(shard_set, row="chats:99")
    (shard_set.path / "rejects.jsonl.zst").unlink()
    with pytest.raises(ConfigError, match=r"8 rows; rejects\.jsonl\.zst.* is missing"):
        locate_sequences(shard_set, row="chats:7")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pack": 4}, "--pack 4: the set has packs 0 to 3"),
        ({"row": "chats"}, "expected SOURCE:ROW with a source among chats"),
        ({"row": "other:1"}, "expected SOURCE:ROW with a source among chats"),
        ({"row": "chats:-1"}, "expected SOURCE:ROW"),
        ({"row": "chats:1", "pack": 0}, "give one of them"),
    ],
)
def test_a_choice_that_the_set_does_not_have_is_refused(
    options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        locate_sequences(write_rejected_row_set(tmp_path / "set"), **options)


def test_a_sample_is_spread_over_the_set(tmp_path: Path) -> None:
    shard_set = write_rejected_row_set(tmp_path / "set")
    assert locate_sequences(shard_set) == [(0, None)]
    assert locate_sequences(shard_set, sample=2) == [(0, None), (2, None)]
    assert locate_sequences(shard_set, sample=99) == [(pack, None) for pack in range(4)]
