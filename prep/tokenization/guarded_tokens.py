"""Tokens that the text of a message may not become, and rows in which somebody typed one.

    text       a <|im_end|> b<|im_end|>    a user typed the first, the template printed the second
    encoded    a <|im_end|> b#             # stands in for the second; the first is plain text

Control tokens are guarded in every text of a conversation, other markup (`<think>`) in texts of the
given kinds only. Where a guarded token covers such text, the row is encoded again with stand-ins:
private-use characters for the tokens that may stay, while all others are plain text.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.rendering.control.tokens import is_markup
from prep.rendering.intervals import Intervals
from prep.rendering.spans import Rendered
from prep.tokenization.byte_offsets import Ints, char_to_byte_offsets
from shared.errors import DataError
from shared.shard_format import Kind

# positions of bytes in a chunk: 32 bits unless it is larger
BytePositions = npt.NDArray[np.int32] | npt.NDArray[np.int64]

_BLOCK_TOKENS = 1 << 18


class GuardedTokens:
    """The guarded tokens of one Hugging Face tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        tokenizer_data: dict[str, Any],
        control_tokens: Sequence[str],
        plain_kinds: Sequence[Kind],
        vocab_size: int,
    ) -> None:
        """`tokenizer_data` is the tokenizer.json of `tokenizer`. Raises DataError for a control
        token without an id."""
        self._tokenizer = tokenizer
        self._data = tokenizer_data
        self._plain_kinds = plain_kinds
        added = (token["content"] for token in tokenizer_data["added_tokens"])
        markup = [token for token in added if plain_kinds and is_markup(token)]
        self._ids: dict[str, int] = {}
        for token in (*control_tokens, *markup):
            index = tokenizer.token_to_id(token)
            if index is None:
                raise DataError(
                    f"the tokenizer names {token!r} as a special token but has no id for it;"
                    " correct its files"
                )
            self._ids[token] = index
        # private-use characters of plane 16, which ends at 0x10FFFD
        first = min(0x10F000, 0x10FFFE - len(self._ids))
        self._stand_ins = {token: chr(first + index) for index, token in enumerate(self._ids)}
        self.is_control = np.zeros(vocab_size, np.bool_)
        self.is_control[[self._ids[token] for token in control_tokens]] = True
        self._is_markup = np.zeros(vocab_size, np.bool_)
        self._is_markup[[self._ids[token] for token in markup]] = True
        self._is_markup &= ~self.is_control
        longest_first = sorted(control_tokens, key=lambda token: (-len(token), token))
        # (?!) matches nothing; the empty pattern of no tokens would match everywhere
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._control_arrays: dict[tuple[str, ...], npt.NDArray[np.int32]] = {}

    def control_ids(self, names: tuple[str, ...]) -> npt.NDArray[np.int32]:
        """Return the ids of control tokens, int32 [len(names)]."""
        if names not in self._control_arrays:
            self._control_arrays[names] = np.asarray([self._ids[name] for name in names], np.int32)
        return self._control_arrays[names]

    def typed_in_chunk(
        self,
        ids: npt.NDArray[np.int32],
        start: BytePositions,
        end: BytePositions,
        rows: Sequence[Rendered],
        byte_offsets: Ints,
    ) -> Ints:
        """Return which tokens of a chunk are guarded and cover text that may not become them.

        Positions of tokens, int64 [K]; `start` and `end` are their bytes in the chunk.
        """
        typed = [np.zeros(0, np.int64)]
        for is_guarded, kinds in ((self.is_control, None), (self._is_markup, self._plain_kinds)):
            guarded = np.flatnonzero(look_up(is_guarded, ids))
            if not len(guarded):
                continue
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
            bounds = np.fromiter(chain.from_iterable(texts), np.int64, 2 * int(counts.sum()))
            bounds = char_to_byte_offsets(rows, byte_offsets, counts, bounds.reshape(-1, 2))
            # Texts are ordered and disjoint: a token shares a byte with one of them if fewer texts
            # end before it than begin before its end.
            ended = np.searchsorted(bounds[:, 1], start[guarded], side="right")
            begun = np.searchsorted(bounds[:, 0], end[guarded], side="left")
            typed.append(guarded[ended < begun])
        return np.concatenate(typed)

    def encode(self, row: Rendered) -> tuple[npt.NDArray[np.int32], Ints]:
        """Return ids, int32 [N], and their characters, int64 [N, 2]; typed tokens are plain text.

        Raises DataError if the tokenizer makes a guarded token all the same.
        """
        encoding = self._tokenizer.encode(row.text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        offsets = self._without_blanks(
            row.text, ids, np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        )
        texts = _texts(row)
        plain = _texts(row, self._plain_kinds)
        if self._typed(texts, plain, ids, offsets).any():
            allowed = self._allowed(row, texts, plain, ids, offsets)
            ids, offsets = self._encode_with_stand_ins(row, allowed)
            typed = ids[self._typed(texts, plain, ids, offsets)]
            if len(typed):
                name = self._tokenizer.id_to_token(int(typed[0]))
                raise DataError(
                    f"the tokenizer makes the token {name!r} from plain text of a message"
                )
        return ids, offsets

    def _without_blanks(self, text: str, ids: npt.NDArray[np.int32], offsets: Ints) -> Ints:
        """Return the offsets; guarded tokens lose the blanks that `lstrip` and `rstrip` add.

        Else the blanks at the beginning of an answer would make a trained token of the marker
        before it.
        """
        for token in np.flatnonzero(self.is_control[ids] | self._is_markup[ids]).tolist():
            first, last = offsets[token].tolist()
            core = text[first:last].strip()
            if core and len(core) < last - first:
                first = text.index(core, first)
                offsets[token] = first, first + len(core)
        return offsets

    def _typed(
        self, texts: Intervals, plain: Intervals, ids: npt.NDArray[np.int32], offsets: Ints
    ) -> npt.NDArray[np.bool_]:
        """Say which tokens are guarded and cover text that may not become them, bool [N]."""
        typed = np.zeros(len(ids), np.bool_)
        for is_guarded, where in ((self.is_control, texts), (self._is_markup, plain)):
            for token in np.flatnonzero(is_guarded[ids]).tolist():
                typed[token] = where.touch(*offsets[token].tolist())
        return typed

    def _allowed(
        self,
        row: Rendered,
        texts: Intervals,
        plain: Intervals,
        ids: npt.NDArray[np.int32],
        offsets: Ints,
    ) -> list[tuple[int, int, str]]:
        """Return the characters of the guarded tokens that may stay, with stand-ins, in order.

        These are the control tokens that the template printed, and other markup outside the plain
        texts.
        """
        allowed = []
        position = 0
        while match := self._control_pattern.search(row.text, position):
            if texts.touch(*match.span()):
                position = match.start() + 1
            else:
                allowed.append((*match.span(), self._stand_ins[match.group()]))
                position = match.end()
        control = Intervals((first, last) for first, last, _ in allowed)
        for token in np.flatnonzero(self._is_markup[ids]).tolist():
            first, last = offsets[token].tolist()
            if not plain.touch(first, last) and not control.touch(first, last):
                # By id: the text of <unk> is any unknown character.
                name = self._tokenizer.id_to_token(int(ids[token]))
                allowed.append((first, last, self._stand_ins[name]))
        return sorted(allowed)

    def _encode_with_stand_ins(
        self, row: Rendered, allowed: list[tuple[int, int, str]]
    ) -> tuple[npt.NDArray[np.int32], Ints]:
        """Return ids and character offsets; no guarded token is made outside `allowed`."""
        if any(stand_in in row.text for stand_in in self._stand_ins.values()):
            raise DataError(
                "a typed control token together with private-use characters of plane 16 cannot be"
                " encoded"
            )
        pieces: list[str] = []
        # for every character of the encoded text, its position in the row's text
        positions: list[Ints] = []
        cursor = 0
        for first, last, stand_in in allowed:
            pieces += [row.text[cursor:first], stand_in]
            positions.append(np.arange(cursor, first + 1))
            cursor = last
        pieces.append(row.text[cursor:])
        positions.append(np.arange(cursor, len(row.text) + 1))
        encoding = self._stand_in_tokenizer.encode("".join(pieces), add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        for token, stand_in in self._stand_ins.items():
            ids[ids == self._stand_in_tokenizer.token_to_id(stand_in)] = self._ids[token]
        offsets = np.concatenate(positions)[np.asarray(encoding.offsets, np.int64).reshape(-1, 2)]
        return ids, self._without_blanks(row.text, ids, offsets)

    @cached_property
    def _stand_in_tokenizer(self) -> Any:
        """The tokenizer to which guarded tokens are plain text and their stand-ins are tokens."""
        import tokenizers

        added = [
            {**token, "special": token["special"] or token["content"] in self._stand_ins}
            for token in self._data["added_tokens"]
        ]
        data = json.dumps({**self._data, "added_tokens": added}, ensure_ascii=False)
        tokenizer = tokenizers.Tokenizer.from_str(data)
        flags = {token["content"]: token for token in added}
        for token, stand_in in self._stand_ins.items():
            sides = {side: flags[token][side] for side in ("lstrip", "rstrip") if token in flags}
            tokenizer.add_tokens([tokenizers.AddedToken(stand_in, normalized=False, **sides)])
        # to this tokenizer, added tokens that are "special" are plain text
        tokenizer.encode_special_tokens = True
        return tokenizer


def _texts(row: Rendered, kinds: Sequence[Kind] | None = None) -> Intervals:
    """Return the ranges of the conversation's texts in a row, of some kinds or of all."""
    return Intervals(
        (s.start, s.end) for s in row.spans if s.is_text and (kinds is None or s.kind in kinds)
    )


def look_up(table: npt.NDArray[Any], ids: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """Return `table[ids]`, block by block: numpy makes 64-bit copies of indices."""
    values = np.empty(len(ids), table.dtype)
    for start in range(0, len(ids), _BLOCK_TOKENS):
        block = slice(start, start + _BLOCK_TOKENS)
        values[block] = table[ids[block]]
    return values
