"""Small tokenizers of several families, trained on the spot, as tokenizer.json texts."""

import json
from functools import cache
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>")
PLAIN_ADDED = ("<think>", "</think>", "  ")  # `special: false`
_CORPUS = [
    "Hello world, hello there. The answer is 42.\n\nYes, it is: 3.14!",
    "user assistant system <|im_start|> im_end think endoftext",
    "na\u00efve caf\u00e9 \u6771\u4eac \U0001f642 e\u0301 a\u0308",
    "def f(x):\n    return x + 1\r\n",
] * 20
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _finish(tokenizer: Any, **flags: bool) -> str:
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, **flags) for token in CONTROL]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED])
    return str(tokenizer.to_str())


def _byte_level_model(normalizer: Any = None, **options: Any) -> Any:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(use_regex=False, **{"add_prefix_space": False, **options}),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    )
    return tokenizer


def _sentencepiece_like(scheme: str, **flags: bool) -> str:
    tokenizer = tokenizers.Tokenizer(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", *byte_tokens], limit_alphabet=40
    )
    tokenizer.train_from_iterator([line for text in _CORPUS for line in text.split("\n")], trainer)
    data = tokenizer.to_str()
    return _finish(_without_added_bytes(data), **flags)


def _without_added_bytes(text: str) -> Any:
    data = json.loads(text)
    data["added_tokens"] = [
        token for token in data["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def _unigram() -> str:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"]),
    )
    return _finish(tokenizer)


def digit_groups(*, special: tuple[str, ...] = CONTROL, tokens: tuple[str, ...] = ()) -> str:
    """A byte-level tokenizer that takes up to three digits at a time, as OLMo-2's does and most
    classes do not."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    years = ["In 2023 and 2024, 1999 of 123456 said: it's three 'll\n\n  lines (ok)."] * 30
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=list(tokens)
    )
    tokenizer.train_from_iterator(years, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = []  # what the trainer was given stays in the vocabulary only
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return str(tokenizer.to_str())


FAMILIES = {
    "byte-level": lambda: _finish(_byte_level_model()),
    "byte-level, NFC": lambda: _finish(_byte_level_model(normalizers.NFC())),
    "byte-level, NFKC": lambda: _finish(_byte_level_model(normalizers.NFKC())),
    "byte-level, lower case": lambda: _finish(_byte_level_model(normalizers.Lowercase())),
    "byte-level, prefix space": lambda: _finish(_byte_level_model(add_prefix_space=True)),
    "byte-level, lstrip": lambda: _finish(_byte_level_model(), lstrip=True),
    "byte-level, rstrip": lambda: _finish(_byte_level_model(), rstrip=True),
    "sentencepiece, first": lambda: _sentencepiece_like("first"),
    "sentencepiece, always": lambda: _sentencepiece_like("always"),
    "sentencepiece, rstrip": lambda: _sentencepiece_like("first", rstrip=True),
    "unigram": _unigram,
}


@cache
def tokenizer_json(family: str) -> str:
    return FAMILIES[family]()
