"""Inspect and stats: what is printed is what lies in the columns, readable without colour and safe
for a terminal."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import zstandard
from lettered_sets import Columns, write_lettered_set
from text_sets import EOS, byte_tokenizer, write_text_set

from prep.inspection.stats import stats, stats_lines
from prep.inspection.terminal import inspect_lines
from prep.inspection.token_text import TokenText
from shared.errors import ArtifactError, ConfigError
from shared.shard_reader import ShardSet, open_shard_set


def body(shard_set: ShardSet, **options: Any) -> list[str]:
    return [line for line in inspect_lines(shard_set, **options) if " | " in line or " : " in line]


def test_a_sequence_is_shown_in_runs_with_marks_and_kinds(tmp_path: Path) -> None:
    shard_set = write_text_set(
        tmp_path / "set",
        ("<user>\n", "t", "0"),
        ("Hi", "u", "0"),
        (">\n\n", "A", "1"),
        ("Yo.", "a", "1"),
        (EOS, "T", "1"),
    )
    lines = list(inspect_lines(shard_set))
    assert lines[0].startswith("+ trained   ~ also covers bytes outside the text")
    assert lines[1] == "== pack 0 of 1: 1 sequences, 16 of 200 tokens, 7 trained"
    assert lines[2] == "-- sequence 0: chats row 0, 16 tokens, 7 trained"
    assert lines[3:] == [
        r"   template   | <user>\n",
        r"   user       | Hi",
        r"+~ assistant  | >\n",
        r"+~            | \n",
        r"+  assistant  | Yo.",
        r"+  terminator | <|end|>",
    ]


def test_colour_adds_nothing_but_colour(tmp_path: Path) -> None:
    shard_set = write_text_set(
        tmp_path / "set", ("<user>", "t", "0"), ("Hi", "u", "0"), ("Yo", "a", "1"), (EOS, "T", "1")
    )
    plain, colored = list(inspect_lines(shard_set)), list(inspect_lines(shard_set, color=True))
    assert plain != colored
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in colored] == plain


def test_a_character_shared_by_tokens_is_whole_in_a_run_and_bytes_across_runs(
    tmp_path: Path,
) -> None:
    def cut_inside_a_character(columns: Columns) -> None:
        columns["kind"][4:6] = 2  # user

    shard_set = write_text_set(
        tmp_path / "set", ("\u6771\u4eac", "a", "0"), spoil=cut_inside_a_character
    )
    assert body(shard_set) == [
        r"   assistant  | " + "\u6771" + r"\xe4",
        r"   user       | \xba\xac",
    ]


def test_text_cannot_command_the_terminal(tmp_path: Path) -> None:
    shard_set = write_text_set(tmp_path / "set", ("\x1b[2J\r\u2028\u202e\u00a0\u3000\t!", "u", "0"))
    assert body(shard_set, color=False) == [
        r"   user       | \x1b[2J\r\u2028\u202e\u00a0" + "\u3000" + r"\t!"
    ]


def test_ids_are_shown_on_demand_beside_their_bytes(tmp_path: Path) -> None:
    shard_set = write_text_set(tmp_path / "set", ("Hi", "u", "0"), (EOS, "T", "1"))
    ids = byte_tokenizer().encode("Hi").ids
    lines = body(shard_set, ids=True)
    assert lines[1].strip() == f"ids : {ids[0]} 'H'  {ids[1]} 'i'"
    assert lines[3].strip() == "ids : 256 '<|end|>'"


def test_every_token_of_a_pack_is_shown_once(tmp_path: Path) -> None:
    text = "a\nbc\n\n" * 5
    shard_set = write_text_set(tmp_path / "set", (text, "u", "0"), ("x\ny", "a", "1"))
    shown = "".join(line.split(" | ", 1)[1] for line in body(shard_set))
    assert shown.replace(r"\n", "\n") == text + "x\ny"


def row_set(tmp_path: Path) -> ShardSet:
    packs = [[("tuaT", "0011"), ("tuaaT", "00111")], [("tutaT", "00011")]]
    path = write_lettered_set(
        tmp_path / "set", [packs, packs], tokenizer_json=byte_tokenizer().to_str().encode()
    )
    event = {
        "source": "chats",
        "row": 7,
        "reason": "malformed",
        "detail": "chats.jsonl line 8 (row 7): no\x1b",
    }
    (path / "rejects.jsonl.zst").write_bytes(zstandard.compress(json.dumps(event).encode() + b"\n"))
    return open_shard_set(path)


def headers(lines: Any) -> list[str]:
    return [line.split(",")[0] for line in lines if line.startswith(("==", "--"))]


def test_a_row_is_found_in_any_shard_and_shown_alone(tmp_path: Path) -> None:
    found = headers(inspect_lines(row_set(tmp_path), row="chats:4"))
    assert found == ["== pack 2 of 4: 2 sequences", "-- sequence 1: chats row 4"]


def test_a_row_that_was_left_out_is_told_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"malformed: chats\.jsonl line 8 \(row 7\): no\\x1b"):
        list(inspect_lines(row_set(tmp_path), row="chats:7"))
    with pytest.raises(
        ConfigError, match="the source has rows 0 to 7, and this one was not chosen"
    ):
        list(inspect_lines(row_set(tmp_path / "other"), row="chats:99"))


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
        list(inspect_lines(row_set(tmp_path), **options))


def test_a_sample_is_spread_over_the_set(tmp_path: Path) -> None:
    shard_set = row_set(tmp_path)
    packs = [line for line in headers(inspect_lines(shard_set, sample=2)) if line.startswith("==")]
    assert [line.split()[2] for line in packs] == ["0", "2"]
    assert len(headers(inspect_lines(shard_set, sample=99))) == 4 + 6


def test_a_tokenizer_that_cannot_be_read_is_an_artefact_error(tmp_path: Path) -> None:
    path = write_lettered_set(tmp_path / "set", [[[("tuaT", "0011")]]])
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        list(inspect_lines(open_shard_set(path)))


def test_tokens_of_other_tokenizers_are_bytes_and_spaces_too(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "\u2581Hi": 1, "<0xE4>": 2, "<0xBA>": 3, "<0xAC>": 4}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = TokenText(tmp_path / "tokenizer.json")
    assert text.text_of([1, 2, 3, 4]) == " Hi\u4eac"
    assert text.text_of([2]) == r"\xe4"
    assert text.text_of([99]) == "<unknown id 99>"


def test_byte_level_tokens_give_back_every_byte(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = TokenText(tmp_path / "tokenizer.json")
    text = "".join(map(chr, range(0x900))) + "\U0001f642" + EOS
    assert b"".join(map(vocabulary.bytes_of, tokenizer.encode(text).ids)) == text.encode()


def test_stats_count_what_the_columns_hold(tmp_path: Path) -> None:
    shard_set = row_set(tmp_path)
    found = stats(shard_set)
    assert json.loads(json.dumps(found)) == found
    assert (found["packs"], found["sequences"], found["tokens"], found["loss_tokens"]) == (
        4,
        6,
        28,
        14,
    )
    assert found["density"] == 28 / (4 * 16)
    assert found["kinds"]["assistant"] == {"tokens": 8, "loss_tokens": 8}
    assert found["kinds"]["user"] == {"tokens": 6, "loss_tokens": 0}
    assert sum(kind["tokens"] for kind in found["kinds"].values()) == 28
    assert found["sequence_length"]["p50"] == 5
    assert found["sequences_per_pack"] == {
        "mean": 1.5, "min": 1, "p5": 1, "p25": 1, "p50": 1, "p75": 2, "p95": 2, "p99": 2, "max": 2,
    }  # fmt: skip
    (source,) = found["sources"]
    assert (source["rows_read"], source["rows_used"], source["loss_share"]) == (8, 6, 1.0)


def test_stats_lines_name_every_reason_for_a_missing_row(tmp_path: Path) -> None:
    text = "\n".join(stats_lines(row_set(tmp_path)))
    assert "4 packs of 16 in 2 shards" in text
    assert "chats: 1 rejected: malformed" in text
    assert "chats: 1 left out: over_length" in text
    assert "\x1b" not in text
