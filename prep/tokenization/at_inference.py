"""Does AutoTokenizer give the ids that the shards have? The answer is reported and decides nothing.

Whoever loads the base model's tokenizer through AutoTokenizer gets what transformers makes of the
directory. If the class in tokenizer_config.json brings its own pre-tokenizer, that one replaces the
one of tokenizer.json. The tokenizer in a shard set names a class that brings none.
"""

import logging
from importlib import metadata
from typing import Any

from prep.tokenization.tokenizer import CANARY_TEXT, LoadedTokenizer, TokenizerFiles

# texts that pre-tokenizers split in different ways
TEXTS = (
    CANARY_TEXT,
    "2023",
    "In 1066 there were 12345678 of them, 3.5% more than 0x1F.",
    "It's theirs; we'll see, I'VE SAID.",
    " leading, trailing ",
    "two  blanks,   three\ttab\n\n\nlines\r\n",
    "def f(self, x_1):\n    return {'a': [x_1**2, -1]}  # ok\n",
    (
        "\u6771\u4eac\u90fd\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002"
        "\u4f60\u597d\uff0c\u4e16\u754c\uff01"
    ),
    (
        "\uc548\ub155\ud558\uc138\uc694 \u041f\u0440\u0438\u0432\u0435\u0442"
        " \u0645\u0631\u062d\u0628\u0627"
    ),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f642\U0001f642",
    "nai\u0308ve cafe\u0301 \ufb01ne \u00bd",
    "https://example.org/a?b=c&d=%20",
    "Hello",
)
_MAX_TOKENS = 64
_MAX_SHOWN_IDS = 8

logger = logging.getLogger(__name__)


def compare_with_inference(files: TokenizerFiles, loaded: LoadedTokenizer) -> dict[str, Any]:
    """Warn if AutoTokenizer gives other ids or names; return the differences, for build_info.json.

    `loaded` must be without the tokens that the mixture adds.
    """
    from transformers import AutoTokenizer

    report: dict[str, Any] = {"transformers": metadata.version("transformers")}
    try:
        theirs = AutoTokenizer.from_pretrained(
            str(files.directory), trust_remote_code=False, local_files_only=True
        )
        # special tokens that differ: name -> [ours, theirs]
        other = {
            name: str(content)
            for name, content in theirs.special_tokens_map.items()
            if isinstance(content, str)
        }
        names = {*loaded.special_tokens, *(other.keys() & {"bos_token", "eos_token"})}
        report["names"] = {
            name: [loaded.special_tokens.get(name), other.get(name)]
            for name in sorted(names)
            if loaded.special_tokens.get(name) != other.get(name)
        }
        texts = []
        tokens = sorted({*loaded.added_tokens, *files.names.declared})[:_MAX_TOKENS]
        for text in (*TEXTS, *(f"a{token}b {token} c" for token in tokens)):
            ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
            at_inference = list(theirs.encode(text, add_special_tokens=False))
            if ids != at_inference:
                texts.append({"text": text, "ids": ids, "at_inference": at_inference})
        report["texts"] = texts
    except Exception as exc:
        # whatever its many classes raise: the build does not need it
        return {**report, "not_loaded": f"{type(exc).__name__}: {exc}"}
    if texts:
        first = texts[0]
        logger.warning(
            "transformers loads %s (as %s) with other ids than its tokenizer.json gives, for %d of"
            " the texts tried: %r is %s in the shards, which follow tokenizer.json, and %s there;"
            " build_info.json lists them",
            files.name,
            type(theirs).__name__,
            len(texts),
            first["text"],
            _short(first["ids"]),
            _short(first["at_inference"]),
        )
    for name, (ours, other_token) in report["names"].items():
        logger.warning(
            "%s: its files name %r as %s, transformers takes %r",
            files.name,
            ours,
            name,
            other_token,
        )
    return report


def _short(ids: list[int]) -> str:
    more = " ..." if len(ids) > _MAX_SHOWN_IDS else ""
    return " ".join(map(str, ids[:_MAX_SHOWN_IDS])) + more
