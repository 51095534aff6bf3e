"""Text -> token ids with the byte range of every token; a control token can only come from the
template.

gigatoken encodes where it can: it is byte-identical to the Hugging Face tokenizer and far faster.
The Hugging Face tokenizer (`tokenizers`) is its referee, and does what gigatoken cannot: text that
the tokenizer normalizes, tokenizers that are not byte-level, and rows in which somebody typed a
control token.

For a byte-level BPE the bytes of each id are known, so all byte ranges are one cumulative sum;
elsewhere they come from the tokenizer's offsets.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.rendering.control.tokens import is_markup
from prep.rendering.intervals import Intervals
from prep.rendering.spans import Rendered
from prep.tokenization.byte_offsets import byte_positions, char_to_byte_offsets
from shared.errors import DataError
from shared.shard_format import Kind

Ints = npt.NDArray[np.int64]
Places = (
    npt.NDArray[np.int32] | npt.NDArray[np.int64]
)  # of bytes in a chunk: 32 bits unless it is larger

_BLOCK_TOKENS = 1 << 18


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """All that an encoder is made from; sent to the worker processes."""

    tokenizer_json: str  # a tokenizer.json without truncation, padding and post-processor
    control_tokens: tuple[str, ...]  # added tokens that text in messages can never become
    backend: str  # "gigatoken" or "transformers"
    plain_kinds: tuple[Kind, ...] = ()  # whose texts can become no other markup token either


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows of a chunk, end to end. N tokens, R rows; bytes count from the start of the chunk's
    text."""

    tokens: npt.NDArray[np.int32]  # [N]
    token_start: Places  # [N] first byte
    token_end: Places  # [N]
    row_offsets: Ints  # [R+1] in tokens
    byte_offsets: Ints  # [R+1] in bytes of text
    # rows that took the Hugging Face path because of normalization or a typed control token
    rows_slow_path: int


def encoder_spec(
    tokenizer_json: str,
    control_tokens: Sequence[str],
    backend: str,
    plain_kinds: tuple[Kind, ...] = (),
) -> EncoderSpec:
    """Return the spec for a tokenizer.json: nothing may be added to, cut from or padded around a
    template's text."""
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
        self._has_byte_lengths = _is_byte_level(self._json) and self._normal_form in (
            None,
            "NFC",
            "NFKC",
            "NFD",
            "NFKD",
        )
        self.vocab_size = 1 + max(
            (
                max(self._json["model"]["vocab"].values(), default=0)
                if isinstance(self._json["model"]["vocab"], dict)
                else len(self._json["model"]["vocab"]) - 1
            ),
            max((token["id"] for token in self._json["added_tokens"]), default=0),
        )
        added = (token["content"] for token in self._json["added_tokens"])
        markup = [token for token in added if spec.plain_kinds and is_markup(token)]
        names = dict.fromkeys((*spec.control_tokens, *markup))
        self._guarded_ids = {token: _known_id(self._hf, token) for token in names}
        # private-use characters that take the place of these tokens where they are not text
        first = min(0x10F000, 0x10FFFE - len(names))
        self._stand_ins = {token: chr(first + index) for index, token in enumerate(names)}
        self.is_control = np.zeros(self.vocab_size, np.bool_)
        self.is_control[[self._guarded_ids[token] for token in spec.control_tokens]] = True
        self.is_added = np.zeros(self.vocab_size, np.bool_)
        self.is_added[[token["id"] for token in self._json["added_tokens"]]] = True
        self._is_markup = np.zeros(
            self.vocab_size, np.bool_
        )  # not control, and plain text in texts of plain_kinds
        self._is_markup[[self._guarded_ids[token] for token in markup]] = True
        self._is_markup &= ~self.is_control
        self._control_arrays: dict[tuple[str, ...], npt.NDArray[np.int32]] = {}

    def encode(self, rows: Sequence[Rendered]) -> Encoded:
        """Encode rendered rows. Raises DataError where a control token would come from the text of
        a message."""
        texts = [row.text.encode("utf-8") for row in rows]
        byte_offsets = np.concatenate(
            ([0], np.cumsum([len(text) for text in texts], dtype=np.int64))
        )
        if self._has_byte_lengths:
            ids, row_offsets = self._encode_batch(texts)
            start, end, exact = self._byte_ranges(ids, row_offsets, byte_offsets, rows)
            by_hand = ~exact
            for which, kinds in ((self.is_control, None), (self._is_markup, self.spec.plain_kinds)):
                guarded = np.flatnonzero(_looked_up(which, ids))
                if len(guarded):
                    bounds = _text_bounds(rows, byte_offsets, kinds)
                    typed = guarded[_touch(start[guarded], end[guarded], *bounds)]
                    by_hand[np.searchsorted(row_offsets, typed, side="right") - 1] = True
        else:
            by_hand = np.ones(len(rows), np.bool_)
        if len(rows) and not by_hand.any():
            return Encoded(ids, start, end, row_offsets, byte_offsets, 0)
        pieces: list[tuple[Any, Any, Any]] = [
            (np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
        ]
        for index, row in enumerate(rows):
            if by_hand[index]:
                row_ids, row_start, row_end = self._encode_with_offsets(row)
                pieces.append(
                    (row_ids, row_start + byte_offsets[index], row_end + byte_offsets[index])
                )
            else:
                part = slice(row_offsets[index], row_offsets[index + 1])
                pieces.append((ids[part], start[part], end[part]))
        lengths = [len(piece[0]) for piece in pieces]
        tokens, starts, ends = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return Encoded(
            tokens,
            starts,
            ends,
            np.cumsum(lengths, dtype=np.int64),
            byte_offsets,
            int(by_hand.sum()),
        )

    def agrees_with_reference(self, row: Rendered, ids: npt.NDArray[np.int32]) -> bool:
        """Say whether `ids` are what the Hugging Face tokenizer makes of the row, message text kept
        plain."""
        return np.array_equal(ids, self._encode_with_offsets(row)[0])

    def rows_with_other_control(self, encoded: Encoded, rows: Sequence[Rendered]) -> Ints:
        """Return the rows whose control tokens are not, one by one, those that the template prints,
        int64 [K]."""
        places = np.flatnonzero(_looked_up(self.is_control, encoded.tokens))
        expected = [self.control_ids(row.control) for row in rows]
        counts = np.fromiter(map(len, expected), np.int64, len(rows))
        bounds = np.searchsorted(places, encoded.row_offsets)
        seen, wanted = encoded.tokens[places], np.concatenate([*expected, np.zeros(0, np.int32)])
        if np.array_equal(np.diff(bounds), counts) and np.array_equal(seen, wanted):
            return np.zeros(0, np.int64)
        own = (seen[first:last] for first, last in pairwise(bounds.tolist()))
        differs = (not np.array_equal(*both) for both in zip(own, expected, strict=True))
        return np.flatnonzero(np.fromiter(differs, np.bool_, len(rows)))

    def control_ids(self, names: tuple[str, ...]) -> npt.NDArray[np.int32]:
        """Return the ids of control tokens, int32 [len(names)]."""
        if names not in self._control_arrays:
            self._control_arrays[names] = np.asarray(
                [self._guarded_ids[name] for name in names], np.int32
            )
        return self._control_arrays[names]

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
        found = self._hf.encode_batch_fast(
            [text.decode("utf-8") for text in texts], add_special_tokens=False
        )
        rows = [np.asarray(row.ids, np.int32) for row in found]
        offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows], dtype=np.int64)))
        return np.concatenate([*rows, np.zeros(0, np.int32)]), offsets

    @cached_property
    def _plain(self) -> Any:
        """The Hugging Face tokenizer to which guarded tokens are plain text, and their stand-ins
        the tokens."""
        import tokenizers

        data = json.loads(self.spec.tokenizer_json)
        for token in data["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self._stand_ins
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
        flags = {token["content"]: token for token in data["added_tokens"]}
        for token, stand_in in self._stand_ins.items():
            sides = (
                {side: flags[token][side] for side in ("lstrip", "rstrip")}
                if token in flags
                else {}
            )
            tokenizer.add_tokens([tokenizers.AddedToken(stand_in, normalized=False, **sides)])
        tokenizer.encode_special_tokens = True  # "special" added tokens are plain text to this one
        return tokenizer

    @cached_property
    def _gigatoken(self) -> Any:
        import gigatoken

        return gigatoken.Tokenizer.from_json(self.spec.tokenizer_json)

    @cached_property
    def token_num_bytes(self) -> npt.NDArray[np.int32]:
        """Number of bytes of every id of a byte-level tokenizer, int32 [vocab_size]."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._json["model"]["vocab"].items():
            lengths[index] = len(token)  # byte-level vocabularies spell each byte as one character
        for token in self._json["added_tokens"]:
            lengths[token["id"]] = len(token["content"].encode("utf-8"))
        return lengths

    def _byte_ranges(
        self,
        ids: npt.NDArray[np.int32],
        row_offsets: Ints,
        byte_offsets: Ints,
        rows: Sequence[Rendered],
    ) -> tuple[Places, Places, npt.NDArray[np.bool_]]:
        """Return first and last byte of every token, and for each row whether they are proved by
        its byte count."""
        if not self._has_byte_lengths:
            zeros = np.zeros(len(ids), np.int64)
            return zeros, zeros, np.zeros(len(rows), np.bool_)
        lengths = _looked_up(self.token_num_bytes, ids)
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
        if not exact.all():  # later rows are shifted by what an inexact row has too many or too few
            ends += np.repeat(byte_offsets[:-1] - bounds[:-1], np.diff(row_offsets)).astype(
                ends.dtype
            )
        same_type = lengths.dtype == ends.dtype
        return np.subtract(ends, lengths, out=lengths if same_type else None), ends, exact

    def _encode_with_offsets(self, row: Rendered) -> tuple[npt.NDArray[np.int32], Ints, Ints]:
        """Encode one row with the Hugging Face tokenizer, byte ranges from its offsets."""
        ids, offsets = self.reference(row)
        byte_at = byte_positions(row.text)
        return ids, byte_at[offsets[:, 0]], byte_at[offsets[:, 1]]

    def reference(self, row: Rendered) -> tuple[npt.NDArray[np.int32], Ints]:
        """Return what the Hugging Face tokenizer makes of a row: ids, int32 [N], and their
        characters, int64 [N, 2]."""
        encoding = self._hf.encode(row.text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        offsets = self._without_blanks(
            row.text, ids, np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        )
        texts = _texts(row)
        plain = _texts(row, self.spec.plain_kinds)
        if self._typed(texts, plain, ids, offsets).any():
            ids, offsets = self._encode_with_stand_ins(
                row, self._allowed(row, texts, plain, ids, offsets)
            )
            for token in ids[self._typed(texts, plain, ids, offsets)].tolist():
                name = self._hf.id_to_token(token)
                raise DataError(
                    f"the tokenizer makes the token {name!r} from plain text of a message"
                )
        return ids, offsets

    def _without_blanks(self, text: str, ids: npt.NDArray[np.int32], offsets: Ints) -> Ints:
        """Return the offsets, guarded tokens without the blanks that `lstrip` and `rstrip` make
        them swallow.

        The blanks at the beginning of an answer must not make a trained token of the marker before
        it.
        """
        for token in np.flatnonzero(self.is_control[ids] | self._is_markup[ids]).tolist():
            first, last = offsets[token].tolist()
            core = text[first:last].strip()
            if core and len(core) < last - first:
                first = text.index(core, first)
                offsets[token] = first, first + len(core)
        return offsets

    def _encode_with_stand_ins(
        self, row: Rendered, allowed: list[tuple[int, int]]
    ) -> tuple[npt.NDArray[np.int32], Ints]:
        """Return ids and character offsets, where no guarded token but those in `allowed` places is
        made.

        text        a <|im_end|> b<|im_end|>        somebody typed the first encoded     a
        <|im_end|> b#                 # is the stand-in; to this tokenizer <|im_end|> is plain text
        """
        if any(stand_in in row.text for stand_in in self._stand_ins.values()):
            raise DataError(
                "a typed control token together with private-use characters of plane 16 cannot be"
                " encoded"
            )
        pieces: list[str] = []
        places: list[Ints] = []  # character of the text at every character of what is encoded
        cursor = 0
        for first, last in allowed:
            pieces += [row.text[cursor:first], self._stand_ins[row.text[first:last]]]
            places.append(np.arange(cursor, first + 1))
            cursor = last
        pieces.append(row.text[cursor:])
        places.append(np.arange(cursor, len(row.text) + 1))
        encoding = self._plain.encode("".join(pieces), add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        for token, stand_in in self._stand_ins.items():
            ids[ids == self._plain.token_to_id(stand_in)] = self._guarded_ids[token]
        offsets = np.concatenate(places)[np.asarray(encoding.offsets, np.int64).reshape(-1, 2)]
        return ids, self._without_blanks(row.text, ids, offsets)

    def _typed(
        self, texts: Intervals, plain: Intervals, ids: npt.NDArray[np.int32], offsets: Ints
    ) -> npt.NDArray[np.bool_]:
        """Say which tokens are guarded ones made from text that may not become them, bool [N]."""
        typed = np.zeros(len(ids), np.bool_)
        for which, where in ((self.is_control, texts), (self._is_markup, plain)):
            for token in np.flatnonzero(which[ids]).tolist():
                typed[token] = where.touch(*offsets[token].tolist())
        return typed

    def _allowed(
        self,
        row: Rendered,
        texts: Intervals,
        plain: Intervals,
        ids: npt.NDArray[np.int32],
        offsets: Ints,
    ) -> list[tuple[int, int]]:
        """Return the character ranges of the guarded tokens that stay such, in order.

        These are the control tokens that the template printed, and other markup outside the plain
        texts.
        """
        found = []
        position = 0
        while match := self._control_pattern.search(row.text, position):
            if texts.touch(*match.span()):
                position = match.start() + 1
            else:
                found.append(match.span())
                position = match.end()
        control = Intervals(found)
        for token in np.flatnonzero(self._is_markup[ids]).tolist():
            first, last = offsets[token].tolist()
            if not plain.touch(first, last) and not control.touch(first, last):
                found.append((first, last))
        return sorted(found)

    @cached_property
    def _control_pattern(self) -> Any:
        import re

        return re.compile(
            "|".join(map(re.escape, sorted(self.spec.control_tokens, key=lambda t: (-len(t), t))))
        )


def _texts(row: Rendered, kinds: Sequence[Kind] | None = None) -> Intervals:
    """Return where text that the conversation brought stands, of some kinds or of all."""
    return Intervals(
        (s.start, s.end) for s in row.spans if s.is_text and (kinds is None or s.kind in kinds)
    )


def _looked_up(table: npt.NDArray[Any], ids: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """Return `table[ids]`, block by block: numpy makes 64-bit copies of indices."""
    found = np.empty(len(ids), table.dtype)
    for start in range(0, len(ids), _BLOCK_TOKENS):
        block = slice(start, start + _BLOCK_TOKENS)
        found[block] = table[ids[block]]
    return found


def _known_id(tokenizer: Any, token: str) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise DataError(
            f"the tokenizer names {token!r} as a special token but has no id for it; correct its"
            " files"
        )
    return int(index)


def _text_bounds(
    rows: Sequence[Rendered], byte_offsets: Ints, kinds: Sequence[Kind] | None = None
) -> tuple[Ints, Ints]:
    """Return first and last byte of every text that a conversation brought into the chunk, in
    order.

    Texts of some kinds only, or of all.
    """
    texts = [
        [
            bound
            for s in row.spans
            if s.is_text and (kinds is None or s.kind in kinds)
            for bound in s[:2]
        ]
        for row in rows
    ]
    counts = np.fromiter(map(len, texts), np.int64, len(rows)) // 2
    places = np.fromiter(chain.from_iterable(texts), np.int64, 2 * int(counts.sum())).reshape(-1, 2)
    starts, ends = char_to_byte_offsets(rows, byte_offsets, counts, places).T
    return starts, ends


def _touch(start: Places, end: Places, text_start: Ints, text_end: Ints) -> npt.NDArray[np.bool_]:
    """Say for every byte range whether it shares a byte with one of the texts, which are ordered
    and disjoint."""
    return np.searchsorted(text_end, start, side="right") < np.searchsorted(
        text_start, end, side="left"
    )


def _is_byte_level(data: dict[str, Any]) -> bool:
    """Whether every token of the model spells bytes, one character each, and the text is split
    without loss."""
    pre = data.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    plain = all(step.get("type") in ("ByteLevel", "Split", "Digits") for step in steps)
    plain &= not any(step.get("add_prefix_space") for step in byte_level)
    plain &= not any(token["lstrip"] or token["rstrip"] for token in data["added_tokens"])
    return bool(data["model"]["type"] == "BPE" and byte_level and plain)
