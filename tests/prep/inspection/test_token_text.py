"""The text of tokens: no byte is lost, and nothing that is printed commands a terminal."""

from pathlib import Path

import tokenizers
from text_sets import EOS, byte_tokenizer

from prep.inspection.token_text import TokenText


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
