"""Over-length policies and the kinds that are trained, seen in built sets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows

from prep.inspection.verification.verify import verify
from prep.selection.over_length import cut
from prep.store.samples import Samples
from shared.errors import SampleTooLongError
from shared.shard_format import Kind
from shared.shard_reader import ShardSet


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture
def tables(tokenizer: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [
        chat("Hi", "short"),
        chat("a", "one", "b", "two", "c", "three " * 40),
        chat("Hi", "long " * 60),
    ]
    return mixture_of([write_rows(tmp_path / "rows.jsonl", rows)], tokenizer, max_seq_len=64)


def texts(shards: ShardSet) -> dict[tuple[int, int], tuple[str, str]]:
    """Return (row, first token) -> (text, trained text)."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(shards.tokenizer_dir / "tokenizer.json"))
    result = {}
    for pack in map(shards.pack, range(shards.num_packs)):
        for origin, start, end in zip(
            pack.seq_origin, pack.seq_offsets[:-1], pack.seq_offsets[1:], strict=True
        ):
            ids, mask = pack.tokens[start:end], pack.loss_mask[start:end]
            result[int(origin[1]), int(origin[2])] = tuple(
                loaded.decode(part.tolist(), skip_special_tokens=False)
                for part in (ids, ids[mask == 1])
            )
    return result


def test_truncate_turns_ends_with_the_last_whole_answer(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    shards = build_set({**tables, "lengths": {"over_length": "truncate_turns"}}, tmp_path / "out")
    text_of = texts(shards)
    assert text_of[1, 0][0].endswith("<|im_start|>assistant\ntwo<|im_end|>")
    assert text_of[1, 0][1] == "one<|im_end|>two<|im_end|>"
    assert (2, 0) not in text_of
    source = shards.manifest.sources[0]
    assert (source.rows_dropped, source.rows_truncated, source.rows_without_terminator) == (
        {"over_length": 1},
        1,
        0,
    )
    verify(tmp_path / "out")


def test_split_loses_no_token_and_trains_all_but_the_first_of_each_fragment(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    whole = texts(build_set({**tables, "max_seq_len": 4096}, tmp_path / "whole"))
    shards = build_set(
        {**tables, "lengths": {"over_length": "split", "min_loss_tokens": 0}}, tmp_path / "out"
    )
    text_of = texts(shards)
    for row in (0, 1, 2):
        keys = sorted(key for key in text_of if key[0] == row)
        assert [first for _, first in keys] == [64 * number for number in range(len(keys))]
        assert "".join(text_of[key][0] for key in keys) == whole[row, 0][0]
    assert shards.manifest.sources[0].details["rows_split"] == 2
    assert shards.manifest.sources[0].rows_truncated == 0
    masks = np.concatenate([np.asarray(columns["loss_mask"]) for columns in shards.shards])
    starts = np.concatenate([np.asarray(columns["seq_offsets"][:-1]) for columns in shards.shards])
    assert not masks[starts].any()
    verify(tmp_path / "out")


def test_error_names_the_first_row_that_is_too_long(tables: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SampleTooLongError, match=r"'rows' row 1 has \d+ tokens"):
        build_set({**tables, "lengths": {"over_length": "error"}}, tmp_path / "out")


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ({"terminator": "last"}, "one<think>why</think>two<|im_end|>"),
        ({"terminator": "none"}, "one<think>why</think>two"),
        ({"reasoning": False}, "one<|im_end|>two<|im_end|>"),
        ({"train_on": "last_assistant", "reasoning": False}, "two<|im_end|>"),
    ],
)
def test_kinds_are_trained_or_not_as_the_policy_says(
    mask: dict[str, Any], expected: str, tokenizer: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a", "one", "b", "<think>why</think>two")])
    shards = build_set(mixture_of([rows], tokenizer, mask=mask), tmp_path / "out")
    assert texts(shards)[0, 0][1] == expected
    verify(tmp_path / "out")


def test_tool_calls_are_trained_or_not_as_the_policy_says(tokenizer: Path, tmp_path: Path) -> None:
    row = chat("a", "text")
    row["messages"][1]["function_calls"] = "f(1)"
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    tables = mixture_of(
        [rows], tokenizer, template="olmo", mask={"tool_calls": False}, max_seq_len=512
    )
    assert texts(build_set(tables, tmp_path / "out"))[0, 0][1] == "text<|endoftext|>"
    verify(tmp_path / "out")


@given(
    lengths=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5), min_size=1, max_size=6),
    max_seq_len=st.integers(2, 20),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_slices_stay_inside_their_sample_and_split_covers_it(
    lengths: list[list[int]], max_seq_len: int, data: st.DataObject
) -> None:
    flat = [length for sample in lengths for length in sample]
    roles = np.array(
        [data.draw(st.sampled_from([Kind.USER, Kind.ASSISTANT])) for _ in flat], np.uint8
    )
    bounds = np.cumsum([0, *flat])
    sizes = np.cumsum([0, *map(len, lengths)])
    samples = Samples(
        np.zeros(bounds[-1], np.uint8),
        bounds[sizes],
        sizes,
        bounds[:-1],
        roles,
        np.full(len(flat), 2, np.uint8),
    )
    full = np.diff(samples.sample_offsets)
    for policy in ("truncate", "truncate_turns", "drop", "split", "error"):
        slices = cut(samples, policy, max_seq_len)
        assert (slices.length <= max_seq_len).all()
        assert (slices.first + slices.length <= full[slices.sample]).all()
        fits = full[slices.sample] <= max_seq_len
        assert (slices.length[fits] == full[slices.sample][fits]).all()
    fragments = cut(samples, "split", max_seq_len)
    assert (
        np.bincount(fragments.sample, weights=fragments.length, minlength=len(full)) == full
    ).all()
