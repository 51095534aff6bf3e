"""Does transformers load the tokenizer's directory to the ids that the shards have? Told, not
decided by.

Whoever asks the base model through AutoTokenizer gets what transformers makes of the directory:
with another pre-tokenizer than that of tokenizer.json where the class named in
tokenizer_config.json brings its own. The tokenizer that the shards carry names a class that brings
none.
"""

import logging
from importlib import metadata
from typing import Any

from prep.tokenization.tokenizer import CANARY_TEXT, LoadedTokenizer, TokenizerFiles

TEXTS = (
    CANARY_TEXT,
    "2023",
    "In 1066 there were 12345678 of them, 3.5% more than 0x1F.",
    "It's theirs; we'll see, I'VE SAID.",
    " leading, trailing ",
    "two  blanks,   three\ttab\n\n\nlines\r\n",
    "def f(self, x_1):\n    return {'a': [x_1**2, -1]}  # ok\n",
    "\u6771\u4eac\u90fd\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002\u4f60\u597d\uff0c\u4e16\u754c\uff01",
    (
        "\uc548\ub155\ud558\uc138\uc694 \u041f\u0440\u0438\u0432\u0435\u0442"
        " \u0645\u0631\u062d\u0628\u0627"
    ),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f642\U0001f642",
    "nai\u0308ve cafe\u0301 \ufb01ne \u00bd",
    "https://example.org/a?b=c&d=%20",
    "Hello",
)
_TOKENS_TRIED = 64
_SHOWN_IDS = 8

logger = logging.getLogger(__name__)


def compare_with_inference(files: TokenizerFiles, loaded: LoadedTokenizer) -> dict[str, Any]:
    """Warn where AutoTokenizer gives other ids or names; return what was found, for
    build_info.json.

    `loaded` without tokens that the mixture adds.
    """
    from transformers import AutoTokenizer

    found: dict[str, Any] = {"transformers": metadata.version("transformers")}
    try:
        theirs = AutoTokenizer.from_pretrained(
            str(files.directory), trust_remote_code=False, local_files_only=True
        )
        found["names"] = _other_names(loaded, theirs)
        found["texts"] = _other_ids(files, loaded, theirs)
    except Exception as exc:  # anything that its many classes raise; the build does not need it
        return {**found, "not_loaded": f"{type(exc).__name__}: {exc}"}
    if found["texts"]:
        shown = found["texts"][0]
        logger.warning(
            "transformers loads %s (as %s) to other ids than its tokenizer.json gives, for %d of"
            " the texts tried: %r is %s in the shards, which go by tokenizer.json, and %s there;"
            " build_info.json lists them",
            files.name,
            type(theirs).__name__,
            len(found["texts"]),
            shown["text"],
            _short(shown["ids"]),
            _short(shown["at_inference"]),
        )
    for name, (ours, other) in found["names"].items():
        logger.warning(
            "%s: its files name %r as %s, transformers takes %r", files.name, ours, name, other
        )
    return found


def _other_names(loaded: LoadedTokenizer, theirs: Any) -> dict[str, list[str | None]]:
    """Return the special tokens that differ: name -> ours, theirs."""
    other = {
        name: str(content)
        for name, content in theirs.special_tokens_map.items()
        if isinstance(content, str)
    }
    names = {*loaded.special_tokens, *(other.keys() & {"bos_token", "eos_token"})}
    pairs = {name: [loaded.special_tokens.get(name), other.get(name)] for name in sorted(names)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _other_ids(files: TokenizerFiles, loaded: LoadedTokenizer, theirs: Any) -> list[dict[str, Any]]:
    tried = sorted({*loaded.added_tokens, *files.names.declared})[:_TOKENS_TRIED]
    different = []
    for text in (*TEXTS, *(f"a{token}b {token} c" for token in tried)):
        ours = loaded.tokenizer.encode(text, add_special_tokens=False).ids
        other = list(theirs.encode(text, add_special_tokens=False))
        if ours != other:
            different.append({"text": text, "ids": ours, "at_inference": other})
    return different


def _short(ids: list[int]) -> str:
    return " ".join(map(str, ids[:_SHOWN_IDS])) + (" ..." if len(ids) > _SHOWN_IDS else "")
