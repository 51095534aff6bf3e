"""Encode rendered rows: token ids with the byte range of every token.

gigatoken encodes where it can: it gives the same ids as the Hugging Face tokenizer and is far
faster. The Hugging Face tokenizer (`tokenizers`) is the reference, and encodes the rest, row by row
with its offsets: text that is normalized, tokenizers that are not byte-level, and rows in which
somebody typed a control token (guarded_tokens.py).

For a byte-level BPE the bytes of each id are known: all byte ranges are one cumulative sum.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.rendering.spans import Rendered
from prep.tokenization.byte_offsets import Ints, byte_positions
from prep.tokenization.guarded_tokens import BytePositions, GuardedTokens, look_up
from shared.shard_format import Kind


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """All that an encoder is made from; sent to the worker processes."""

    # a tokenizer.json without truncation, padding and post-processor
    tokenizer_json: str
    # added tokens that text in messages can never become
    control_tokens: tuple[str, ...]
    # "gigatoken" or "transformers"
    backend: str
    # kinds of text that can become no other markup token either
    plain_kinds: tuple[Kind, ...] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows of a chunk, end to end: N tokens, R rows. Bytes count from the start of the chunk."""

    tokens: npt.NDArray[np.int32]  # [N]
    token_start: BytePositions  # [N] first byte
    token_end: BytePositions  # [N]
    row_offsets: Ints  # [R+1] in tokens
    byte_offsets: Ints  # [R+1] in bytes of text
    # rows that the Hugging Face tokenizer encoded with offsets
    rows_slow_path: int


def encoder_spec(
    tokenizer_json: str,
    control_tokens: Sequence[str],
    backend: str,
    plain_kinds: tuple[Kind, ...] = (),
) -> EncoderSpec:
    """Return the spec for a tokenizer.json, changed to encode a template's text as it is: nothing
    added, truncated or padded."""
    data = json.loads(tokenizer_json)
    data.update(truncation=None, padding=None, post_processor=None)
    return EncoderSpec(
        json.dumps(data, ensure_ascii=False), tuple(control_tokens), backend, plain_kinds
    )


class Encoder:
    """A tokenizer at work in one process."""

    def __init__(self, spec: EncoderSpec) -> None:
        import tokenizers

        self.spec = spec
        self._json = json.loads(spec.tokenizer_json)
        self._hf = tokenizers.Tokenizer.from_str(spec.tokenizer_json)
        normalizer = self._json.get("normalizer")
        self._normal_form = normalizer["type"] if normalizer else None
        # The bytes of each token are known if tokens spell bytes, one character each, and together
        # the whole text. A normal form leaves most texts as they are, which unicodedata proves row
        # by row; of other normalizers nothing is known.
        pre = self._json.get("pre_tokenizer") or {}
        steps = pre.get("pretokenizers", [pre])
        byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
        self._has_byte_lengths = (
            self._json["model"]["type"] == "BPE"
            and bool(byte_level)
            and all(step.get("type") in ("ByteLevel", "Split", "Digits") for step in steps)
            and not any(step.get("add_prefix_space") for step in byte_level)
            and not any(token["lstrip"] or token["rstrip"] for token in self._json["added_tokens"])
            and self._normal_form in (None, "NFC", "NFKC", "NFD", "NFKD")
        )
        vocab = self._json["model"]["vocab"]
        added_ids = [token["id"] for token in self._json["added_tokens"]]
        last_id = max(vocab.values(), default=0) if isinstance(vocab, dict) else len(vocab) - 1
        self.vocab_size = 1 + max(last_id, *added_ids, 0)
        self._guarded = GuardedTokens(
            self._hf, self._json, spec.control_tokens, spec.plain_kinds, self.vocab_size
        )
        self.is_control = self._guarded.is_control
        self.is_added = np.zeros(self.vocab_size, np.bool_)
        self.is_added[added_ids] = True

    def encode(self, rows: Sequence[Rendered]) -> Encoded:
        """Encode rendered rows. Raises DataError if a control token would come from a message."""
        texts = [row.text.encode("utf-8") for row in rows]
        byte_offsets = np.concatenate(
            ([0], np.cumsum([len(text) for text in texts], dtype=np.int64))
        )
        if self._has_byte_lengths:
            ids, row_offsets = self._encode_batch(texts)
            start, end, exact = self._byte_ranges(ids, row_offsets, byte_offsets, rows)
            slow = ~exact  # bool [R]
            typed = self._guarded.typed_in_chunk(ids, start, end, rows, byte_offsets)
            slow[np.searchsorted(row_offsets, typed, side="right") - 1] = True
        else:
            slow = np.ones(len(rows), np.bool_)
        if len(rows) and not slow.any():
            return Encoded(ids, start, end, row_offsets, byte_offsets, 0)
        # Some row takes the slow path: put the chunk together row by row.
        pieces: list[tuple[Any, Any, Any]] = [
            (np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
        ]
        for index, row in enumerate(rows):
            if slow[index]:
                row_ids, offsets = self.reference(row)
                byte_at = byte_positions(row.text) + byte_offsets[index]
                pieces.append((row_ids, byte_at[offsets[:, 0]], byte_at[offsets[:, 1]]))
            else:
                tokens = slice(row_offsets[index], row_offsets[index + 1])
                pieces.append((ids[tokens], start[tokens], end[tokens]))
        lengths = [len(piece[0]) for piece in pieces]
        ids, start, end = (np.concatenate(column) for column in zip(*pieces, strict=True))
        row_offsets = np.cumsum(lengths, dtype=np.int64)
        return Encoded(ids, start, end, row_offsets, byte_offsets, int(slow.sum()))

    def reference(self, row: Rendered) -> tuple[npt.NDArray[np.int32], Ints]:
        """Return the Hugging Face tokenizer's ids of a row, int32 [N], and their characters, int64
        [N, 2]."""
        return self._guarded.encode(row)

    def agrees_with_reference(self, row: Rendered, ids: npt.NDArray[np.int32]) -> bool:
        """Say whether `ids` are those of the Hugging Face tokenizer."""
        return np.array_equal(ids, self.reference(row)[0])

    def rows_with_other_control(self, encoded: Encoded, rows: Sequence[Rendered]) -> Ints:
        """Return the rows whose control tokens differ from those that the template prints, int64
        [K]."""
        positions = np.flatnonzero(look_up(self.is_control, encoded.tokens))
        expected = [self._guarded.control_ids(row.control) for row in rows]
        counts = np.fromiter(map(len, expected), np.int64, len(rows))
        bounds = np.searchsorted(positions, encoded.row_offsets)
        ids = encoded.tokens[positions]
        # Nearly always nothing differs: compare the whole chunk before its rows.
        if np.array_equal(np.diff(bounds), counts) and np.array_equal(
            ids, np.concatenate([*expected, np.zeros(0, np.int32)])
        ):
            return np.zeros(0, np.int64)
        ids_of_row = (ids[first:last] for first, last in pairwise(bounds.tolist()))
        differs = (not np.array_equal(*both) for both in zip(ids_of_row, expected, strict=True))
        return np.flatnonzero(np.fromiter(differs, np.bool_, len(rows)))

    def batch_ids(self, text: str) -> list[int]:
        """Return the configured backend's ids of any text."""
        return list(map(int, self._encode_batch([text.encode("utf-8")])[0]))

    def ids_of(self, text: str) -> list[int]:
        """Return the Hugging Face tokenizer's ids of any text."""
        return list(self._hf.encode(text, add_special_tokens=False).ids)

    def _encode_batch(self, texts: list[bytes]) -> tuple[npt.NDArray[np.int32], Ints]:
        if self.spec.backend == "gigatoken":
            layout = self._gigatoken.encode_batch(texts, parallel=False).layout
            offsets = np.asarray(layout.offsets.data, dtype=np.int64)
            ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]].astype(np.int32)
            return ids, offsets - offsets[0]
        encodings = self._hf.encode_batch_fast(
            [text.decode("utf-8") for text in texts], add_special_tokens=False
        )
        rows = [np.asarray(encoding.ids, np.int32) for encoding in encodings]
        offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows], dtype=np.int64)))
        return np.concatenate([*rows, np.zeros(0, np.int32)]), offsets

    @cached_property
    def _gigatoken(self) -> Any:
        import gigatoken

        return gigatoken.Tokenizer.from_json(self.spec.tokenizer_json)

    @cached_property
    def token_num_bytes(self) -> npt.NDArray[np.int32]:
        """Number of bytes of every id of a byte-level tokenizer, int32 [vocab_size]."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._json["model"]["vocab"].items():
            # a byte-level vocabulary spells each byte as one character
            lengths[index] = len(token)
        for token in self._json["added_tokens"]:
            lengths[token["id"]] = len(token["content"].encode("utf-8"))
        return lengths

    def _byte_ranges(
        self,
        ids: npt.NDArray[np.int32],
        row_offsets: Ints,
        byte_offsets: Ints,
        rows: Sequence[Rendered],
    ) -> tuple[BytePositions, BytePositions, npt.NDArray[np.bool_]]:
        """Return the byte range of every token, and which rows are exact, bool [R]: the bytes of
        the tokens add up to those of the text."""
        lengths = look_up(self.token_num_bytes, ids)
        total = max(int(lengths.sum(dtype=np.int64)), int(byte_offsets[-1]))
        ends: Any = np.cumsum(lengths, dtype=np.int32 if total < 1 << 31 else np.int64)
        bounds = (
            np.where(row_offsets > 0, ends[np.maximum(row_offsets, 1) - 1], 0)
            if len(ends)
            else row_offsets * 0
        )
        exact = np.diff(bounds) == np.diff(byte_offsets)
        if self._normal_form is not None:
            form: Any = self._normal_form
            exact &= np.fromiter(
                (unicodedata.is_normalized(form, row.text) for row in rows), np.bool_, len(rows)
            )
        if not exact.all():
            # An inexact row shifts all rows behind it: begin each at its own first byte.
            ends += np.repeat(byte_offsets[:-1] - bounds[:-1], np.diff(row_offsets)).astype(
                ends.dtype
            )
        same_type = lengths.dtype == ends.dtype
        return np.subtract(ends, lengths, out=lengths if same_type else None), ends, exact
