"""Inspect: what is printed is what the columns hold, readable without colour and safe."""

import re
from pathlib import Path
from typing import Any

import pytest
from lettered_sets import Columns, write_lettered_set
from text_sets import EOS, byte_tokenizer, write_rejected_row_set, write_text_set

from prep.inspection.terminal import inspect_lines
from shared.errors import ArtifactError
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


def test_a_row_is_shown_alone_under_its_pack(tmp_path: Path) -> None:
    lines = list(inspect_lines(write_rejected_row_set(tmp_path / "set"), row="chats:4"))
    headers = [line.split(",")[0] for line in lines if line.startswith(("==", "--"))]
    assert headers == ["== pack 2 of 4: 2 sequences", "-- sequence 1: chats row 4"]


def test_a_tokenizer_that_cannot_be_read_is_an_artefact_error(tmp_path: Path) -> None:
    path = write_lettered_set(tmp_path / "set", [[[("tuaT", "0011")]]])
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        list(inspect_lines(open_shard_set(path)))
