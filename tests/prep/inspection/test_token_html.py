"""A token on the page: every byte is visible, and a shared character stands in one place."""

from pathlib import Path
from typing import Any

import pytest
from lettered_sets import Columns
from page_parser import ParsedPage
from text_sets import byte_tokenizer, write_text_set

from prep.inspection.html_page import page_of
from shared.shard_reader import ShardSet


def parsed(shard_set: ShardSet, **options: Any) -> ParsedPage:
    return ParsedPage(page_of(shard_set, **options))


def bytes_of(token: str) -> bytes:
    """Invert the byte-level alphabet, from its published definition."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return bytes(ord(c) if ord(c) in visible else hidden[ord(c) - 256] for c in token)


@pytest.mark.parametrize(
    ("character", "expected"),
    [
        (" ", "<i> </i>"),
        ("\n", '<i class="n"></i>\n'),
        ("\t", '<i class="t">\t</i>'),
        ("\u3000", "<i>\u3000</i>"),
    ],
)
def test_white_space_is_marked_and_stays_what_it_is(
    character: str, expected: str, tmp_path: Path
) -> None:
    merges = {"\u3000": [("\u00e3", "\u0122"), ("\u00e3\u0122", "\u0122")]}.get(character, [])
    shard_set = write_text_set(
        tmp_path / "set", (character, "u", "0"), tokenizer=byte_tokenizer(*merges)
    )
    assert len(shard_set.pack(0).tokens) == 1
    assert f">{expected}</span>" in page_of(shard_set)


@pytest.mark.parametrize(
    "character", ["\x00", "\r", "\x1b", "\x7f", "\u00a0", "\u2028", "\u202e", "\u200d", "\ue000"]
)
def test_a_character_without_a_shape_is_spelled_out(character: str, tmp_path: Path) -> None:
    page = page_of(write_text_set(tmp_path / "set", (f"a{character}b", "u", "0")))
    assert character not in page
    spelled = repr(character)[1:-1] if ord(character) < 0x80 else f"\\u{ord(character):04x}"
    assert spelled in [chip for token in ParsedPage(page).tokens for chip in token.chips]


@pytest.mark.parametrize("character", ["\ufe0f", "\u3164", "\u2800", "\U000e0141", "\u034f"])
def test_text_cannot_hide_in_characters_that_nobody_sees(character: str, tmp_path: Path) -> None:
    page = parsed(write_text_set(tmp_path / "set", (f"a{character}", "u", "0")))
    assert page.tokens[-1].chips[-1] == character.encode("unicode_escape").decode()


def test_a_mark_does_not_sit_on_the_token_before_it(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(("\u00cc", "\u0123"))  # the bytes of U+0301 as one token
    shard_set = write_text_set(tmp_path / "set", ("e\u0301", "u", "0"), tokenizer=tokenizer)
    assert '<i class="m"></i>\u0301</span>' in page_of(shard_set)


def test_a_character_of_several_tokens_stands_in_the_last_and_its_bytes_in_each(
    tmp_path: Path,
) -> None:
    first, second, third = parsed(write_text_set(tmp_path / "set", ("\u6771", "u", "0"))).tokens
    assert (first.text, second.text, third.text) == ("e6", "9d", "b1\u6771")
    assert third.chips == ["b1"]
    assert [token.title.partition(", ")[2] for token in (first, second, third)] == [
        "bytes e6, part of U+6771",
        "bytes 9d, part of U+6771",
        "bytes b1, part of U+6771",
    ]


def test_a_token_may_end_one_character_and_begin_another(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(("\u013f", "\u00e4"))  # b'\x9d\xe4': ends U+4E1D, begins the next
    shard_set = write_text_set(tmp_path / "set", ("\u4e1d\u4eac", "u", "0"), tokenizer=tokenizer)
    texts = [token.text for token in parsed(shard_set).tokens]
    assert texts == ["e4", "b8", "9d\u4e1de4", "ba", "ac\u4eac"]


def test_bytes_that_are_no_text_are_shown_as_bytes(tmp_path: Path) -> None:
    alphabet = sorted(byte_tokenizer().get_vocab().items())
    number = {bytes_of(token): index for token, index in alphabet if index < 256}
    wanted = [b"\xff", b"a", b"\xe6", b"b", b"\xe6", b"\x9d"]

    def spoil(columns: Columns) -> None:
        columns["tokens"][:] = [number[data] for data in wanted]

    page = parsed(write_text_set(tmp_path / "set", ("x" * len(wanted), "u", "0"), spoil=spoil))
    assert [token.text for token in page.tokens] == ["\\xff", "a", "\\xe6", "b", "\\xe6", "\\x9d"]


def test_an_id_that_the_tokenizer_does_not_know_is_named(tmp_path: Path) -> None:
    def spoil(columns: Columns) -> None:
        columns["tokens"][:] = 299

    assert (
        "<unknown id 299>"
        in parsed(write_text_set(tmp_path / "set", ("x", "u", "0"), spoil=spoil)).tokens[0].text
    )
