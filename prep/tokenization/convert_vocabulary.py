"""Convert tokenizer.model or vocabulary files to a tokenizer.json, with transformers.

The inputs of a build contain the hash of the result: a release of transformers that converts the
same files differently changes the inputs. The hash is remembered, so that the next build need not
import transformers to know it.
"""

import logging
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from shared.errors import DataError, PrerequisiteError
from shared.hashing import digest, sha256_bytes

_LIBRARIES = ("tokenizers", "transformers")

logger = logging.getLogger(__name__)


def converted_sha256(
    directory: Path, files: dict[str, str], known: Mapping[str, Any]
) -> tuple[str, str]:
    """Return the key of what the conversion of `files` (name -> hash) depends on, and the hash of
    its result."""
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    key = f"tokenizer-converted:{digest({'files': files, 'versions': versions})}"
    remembered = known.get(key)
    if isinstance(remembered, str):
        return key, remembered
    return key, sha256_bytes(converted_json(directory).encode("utf-8"))


@cache
def converted_json(directory: Path) -> str:
    """Return the tokenizer.json that transformers makes of other files. Raises DataError,
    PrerequisiteError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as exc:
        # from any of the libraries that read such files
        raise DataError(
            f"{directory} has no tokenizer.json, and transformers cannot make one: {exc}"
        ) from exc
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PrerequisiteError(
            f"{directory}: not a fast tokenizer; save it with transformers as tokenizer.json first"
        )
    logger.info(
        "%s has no tokenizer.json: converted from its other files by transformers %s",
        directory.name,
        metadata.version("transformers"),
    )
    return str(backend.to_str())
