"""Canonical JSON and sha256: what identifies content here, never a location or a time."""

import hashlib
import json
from pathlib import Path

_BLOCK_BYTES = 1 << 22


def canonical_json(value: object) -> bytes:
    """Return UTF-8 JSON with sorted keys, two-space indent and a final newline: equal values, equal
    bytes.

    Raises ValueError for NaN and infinities, which JSON cannot express.
    """
    # this spelling is part of the format: FORMAT.md, "Canonical JSON"
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def digest(value: object) -> str:
    """Return the sha256 (64 hex digits) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def seed_from(*parts: object) -> int:
    """Return a 64-bit seed that depends on every part and on their order, the same on every
    machine."""
    # Python's own hash() differs from process to process
    return int.from_bytes(hashlib.sha256(canonical_json(list(parts))).digest()[:8], "little")
