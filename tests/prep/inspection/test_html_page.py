"""The page: each token once, in order, coloured by what the columns say, and no text that can do
anything."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from click.testing import CliRunner
from lettered_sets import LETTERS, Columns
from page_parser import ParsedPage
from text_sets import EOS, byte_tokenizer, write_text_pack, write_text_set

from prep.cli.main import cli
from prep.inspection.html_page import page_of, write_page
from shared import config
from shared.errors import ArtifactError, ConfigError
from shared.hashing import digest
from shared.shard_format import KIND_MASK, STRADDLES, Manifest, fingerprint_of_manifest
from shared.shard_reader import ShardSet, open_shard_set

HOSTILE = (
    "</script><script>alert(1)</script><style>*{}</style><!-- <img src=x onerror=alert(2)> --> &lt;"
    " \" onclick='x' </span></div></article>]]> javascript:x"
    " \x00\x1b[2J\x07\r\u2028\u202e\u2066\u200b\u200d\ufeff\u00ad\x9b"
)
TAGS = {
    "html", "head", "meta", "title", "style", "script", "body", "header", "h1", "h2", "h3", "main",
    "section", "article", "div", "p", "dl", "dt", "dd", "ul", "li", "hr", "span", "small", "label",
    "input", "kbd", "code", "bdi", "a", "i", "u", "svg", "rect", "path",
}  # fmt: skip
TAME = re.compile(r"[\n\t\x20-\x7e]|[^\x00-\xff]", re.DOTALL)
CHAT = [
    ("<user>\n", "t", "0"),
    ("Hi ", "u", "0"),
    (">\n", "A", "1"),
    ("Yo\t!", "a", "1"),
    (EOS, "T", "1"),
]


def parsed(shard_set: ShardSet, **options: Any) -> ParsedPage:
    return ParsedPage(page_of(shard_set, **options))


def redeclared(path: Path, change: Any) -> ShardSet:
    """Change a set's manifest so that its fingerprint and its seal still hold."""
    file = path / "manifest.json"
    plain = json.loads(file.read_bytes())
    change(plain)
    del plain["seal"]
    plain["fingerprint"] = ""
    plain["fingerprint"] = fingerprint_of_manifest(config.build(Manifest, plain, "test"))
    file.write_text(json.dumps({**plain, "seal": digest(plain)}), encoding="utf-8")
    return open_shard_set(path)


@pytest.mark.parametrize("seed", range(5))
def test_every_token_stands_once_in_order_with_its_kind_mask_id_and_bytes(
    seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    letters = "".join(LETTERS)
    sequences = []
    for length in rng.integers(1, 60, 4):
        texts = (
            "".join(map(chr, rng.choice([*range(32, 127), 10, 9, 0x6771, 0x1F642, 0x301], 3)))
            for _ in range(length)
        )
        sequences.append(
            [(text, rng.choice(list(letters)), str(rng.integers(2))) for text in texts]
        )
    shard_set = write_text_pack(tmp_path / "set", sequences, max_seq_len=5000)
    pack, kinds = shard_set.pack(0), shard_set.kinds(0)
    page = parsed(shard_set)
    assert [len(card) for card in page.cards] == np.diff(pack.seq_offsets).tolist()
    names = {number: name for name, number in shard_set.manifest.kinds.items()}
    tokenizer = byte_tokenizer()
    for token, number, kind, target in zip(
        page.tokens, pack.tokens, kinds, pack.loss_mask, strict=True
    ):
        assert token.classes[0] == names[kind & KIND_MASK]
        assert ("on" in token.classes, "astride" in token.classes) == (
            target == 1,
            kind & STRADDLES != 0,
        )
        data = EOS.encode() if number == 256 else bytes_of(tokenizer.id_to_token(number))
        assert re.fullmatch(
            rf"id {number}, bytes {data.hex(' ')}(, part of U\+[0-9A-F]{{4,5}})*", token.title
        )


def bytes_of(token: str) -> bytes:
    """Invert the byte-level alphabet, from its published definition."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return bytes(ord(c) if ord(c) in visible else hidden[ord(c) - 256] for c in token)


def test_the_text_of_the_tokens_is_the_text_that_they_stand_for(tmp_path: Path) -> None:
    page = parsed(write_text_set(tmp_path / "set", *CHAT))
    assert "".join(token.text for token in page.tokens) == "".join(text for text, _, _ in CHAT)
    assert all(not token.chips for token in page.tokens)


def test_hostile_text_adds_no_tag_no_attribute_and_no_command(tmp_path: Path) -> None:
    plain = parsed(
        write_text_set(tmp_path / "plain", ("x" * 300, "u", "0"), (EOS, "T", "1"), max_seq_len=5000)
    )
    shard_set = write_text_set(
        tmp_path / "set", (HOSTILE, "u", "0"), (EOS, "T", "1"), max_seq_len=5000
    )

    def change(manifest: dict[str, Any]) -> None:
        name = HOSTILE.replace("\x00", "")  # a manifest with NUL in it is refused
        manifest["name"] = name
        manifest["tokenizer"]["name"] = manifest["chat_template"]["name"] = name
        manifest["sources"][0]["name"] = name
        manifest["kinds"][name] = manifest["kinds"].pop("user")

    event = {"source": HOSTILE, "row": 0, "reason": HOSTILE, "detail": HOSTILE}
    (tmp_path / "set" / "rejects.jsonl.zst").write_bytes(
        zstandard.compress(json.dumps(event).encode())
    )
    page = page_of(redeclared(shard_set.path, change))
    parsed_page = ParsedPage(page)
    assert parsed_page.tags <= TAGS
    names = {(tag, name) for tag, name, _ in parsed_page.attributes}
    assert names <= {(tag, name) for tag, name, _ in plain.attributes} | {
        ("i", "class"),
        ("u", "class"),
        ("p", "class"),
    }
    assert not [
        name
        for _, name, _ in parsed_page.attributes
        if name.startswith("on") or name in ("style", "src", "srcdoc")
    ]
    assert not TAME.sub("", page)
    assert not re.search("[\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]", page)
    assert parsed_page.raw == plain.raw
    shown = re.sub(
        r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|r)",
        "",
        "".join(token.text for token in parsed_page.tokens[:-1]),
    )
    assert shown.startswith(HOSTILE[: HOSTILE.index("\x00")])
    assert parsed_page.tokens[0].classes == ["other"]


def test_no_style_and_no_script_but_the_pages_own_may_run(tmp_path: Path) -> None:
    page = parsed(write_text_set(tmp_path / "set", *CHAT))
    (policy,) = [
        value for _, name, value in page.attributes if name == "content" and "default-src" in value
    ]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for what, (text,) in page.raw.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{what}-src 'sha256-{digest}'" in policy


def test_the_page_names_no_other_address(tmp_path: Path) -> None:
    page = page_of(write_text_set(tmp_path / "set", *CHAT))
    assert not re.search(
        r"//[a-z]|https?:|url\(|@import|fetch\(|XMLHttp|WebSocket|\bimport\b", page
    )
    parsed_page = ParsedPage(page)
    assert parsed_page.values("src", "srcset", "action", "data", "poster", "xlink:href") == []
    links = parsed_page.values("href")
    assert links == ["#p0s0"]
    assert len(parsed_page.ids) == len(set(parsed_page.ids))
    assert {link[1:] for link in links} <= set(parsed_page.ids)


def test_the_header_names_the_set_and_the_legend_counts_what_is_shown(tmp_path: Path) -> None:
    shard_set = write_text_pack(tmp_path / "set", [CHAT, [("abc", "s", "0"), ("d", "c", "1")]])
    words = " ".join(parsed(shard_set).words)
    assert shard_set.manifest.fingerprint in words
    for expected in (
        "lettered",
        "pack 0 of 1",
        f"{shard_set.manifest.totals.density:.2%} of 200 tokens a pack",
    ):
        assert expected in words
    legend = " ".join(words.split())
    for expected in (
        "template 7, none trained",
        "system 3, none trained",
        "assistant 6, all trained",
        "tool call 1, all",
    ):
        assert expected in legend
    assert "trained 8" in legend
    assert "not trained 13" in legend
    assert "straddles 2," in legend
    assert "2 sequences, 21 of 200 tokens (10.5% full), 8 trained (38.1%)" in legend


def test_each_card_names_its_row_and_its_counts(tmp_path: Path) -> None:
    page = parsed(write_text_pack(tmp_path / "set", [CHAT, [("abc", "s", "0"), ("d", "c", "1")]]))
    first, second = page.heads
    assert first.strip() == "0: chats row 017 tokens, 7 trained (41.2%)"
    assert second.strip() == "1: chats row 14 tokens, 1 trained (25.0%)"


def test_a_row_that_was_cut_says_so(tmp_path: Path) -> None:
    shard_set = write_text_pack(tmp_path / "set", [CHAT, CHAT])
    event = {"source": "chats", "row": 1, "reason": "truncated", "detail": "900 tokens cut to 17"}
    other = {"source": "chats", "row": 7, "reason": "malformed", "detail": "no"}
    lines = "".join(json.dumps(line) + "\n" for line in (event, other))
    (shard_set.path / "rejects.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    whole, cut = parsed(shard_set).heads
    assert "truncated" not in whole
    assert "truncated: 900 tokens cut to 17" in cut


def test_a_sample_that_was_split_names_its_fragments(tmp_path: Path) -> None:
    def split(columns: Columns) -> None:
        columns["seq_origin"][:] = [(0, 4, 0), (0, 5, 0), (0, 4, 17)]

    heads = parsed(write_text_pack(tmp_path / "set", [CHAT, CHAT, CHAT], spoil=split)).heads
    assert "fragment 1 of 2: tokens 0 to 16 of its sample" in heads[0]
    assert "fragment" not in heads[1]
    assert "fragment 2 of 2: tokens 17 to 33 of its sample" in heads[2]


def test_a_row_is_shown_alone_on_the_map_of_its_whole_pack(tmp_path: Path) -> None:
    shard_set = write_text_pack(tmp_path / "set", [CHAT, CHAT, CHAT])
    page = parsed(shard_set, row="chats:1")
    assert [head.partition("17 tokens")[0].strip() for head in page.heads] == ["1: chats row 1"]
    assert page.values("href") == ["#p0s1"]
    assert "3 sequences (1 shown)" in " ".join(page.words)
    widths = [
        int(value) for tag, name, value in page.attributes if (tag, name) == ("rect", "width")
    ]
    assert sum(widths) == len(shard_set.pack(0).tokens)


def test_a_choice_that_the_set_does_not_have_is_refused(tmp_path: Path) -> None:
    shard_set = write_text_set(tmp_path / "set", *CHAT)
    with pytest.raises(ConfigError, match="--pack 1: the set has packs 0 to 0"):
        page_of(shard_set, pack=1)
    with pytest.raises(ConfigError, match="give one of them"):
        page_of(shard_set, pack=0, row="chats:0")


def test_the_longest_packs_stay_a_page_that_a_browser_can_hold(tmp_path: Path) -> None:
    part = [("word " * 800, "u", "0"), ("and so on\n" * 400, "a", "1"), (EOS, "T", "1")]
    shard_set = write_text_pack(tmp_path / "set", [part * 4], max_seq_len=1 << 15)
    page = page_of(shard_set)
    assert len(ParsedPage(page).tokens) == 32_004
    assert len(page) < 100 * 32_004


def test_the_same_set_gives_the_same_page(tmp_path: Path) -> None:
    assert page_of(write_text_set(tmp_path / "a", *CHAT)) == page_of(
        write_text_set(tmp_path / "b", *CHAT)
    )


def test_the_command_writes_the_page_and_says_where(tmp_path: Path) -> None:
    shard_set = write_text_set(tmp_path / "set", *CHAT)
    out = tmp_path / "new" / "page.html"
    done = CliRunner().invoke(
        cli, ["inspect", str(shard_set.path), "--pack", "0", "--html", str(out)]
    )
    assert (done.exit_code, done.stdout) == (
        0,
        f"{out}: {out.stat().st_size:,} bytes, open it in a browser\n",
    )
    assert out.read_text(encoding="utf-8") == page_of(shard_set)


def test_a_file_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    shard_set = write_text_set(tmp_path / "set", *CHAT)
    with pytest.raises(ArtifactError, match="give --html another file"):
        write_page(shard_set, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
