"""One chunk of raw rows -> columns of the sample store. Runs in a worker process; knows no other
chunk.

What a row can become: a sample; a reject (malformed, or its spans cannot be proved); an unrendered
row (the template would drop a part of it). Each is counted and listed with its reason.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.conversations.conversation import Conversation, calls_not_json, content_hash, prompt_hash
from prep.conversations.formats import read_conversation, read_group
from prep.rendering.compiled.template import CompiledTemplate
from prep.rendering.control.injection import ControlCheck
from prep.rendering.coverage import all_unrendered, without_messages
from prep.rendering.mask_audit import NotComparableError, first_difference, windows
from prep.rendering.spans import ROLE_KINDS, Rendered, find_spans
from prep.rendering.template import ChatTemplate, TemplateText
from prep.rendering.turns import learn_rules
from prep.sources.chunk import Chunk, parse_chunk
from prep.store.samples import TRAIN_NO, TRAIN_UNSET
from prep.tokenization.align import Aligned, align
from prep.tokenization.encoder import Encoded, Encoder, EncoderSpec
from shared.errors import DataError, TemplateError
from shared.shard_format import ASSISTANT_KINDS, KIND_MASK

REFEREE_EVERY = (
    128  # one row in so many, by content hash, is encoded again by the Hugging Face tokenizer
)
AUDIT_EVERY = 128  # its mask is made again (and that of one row of every chunk)
AUDIT_CHARACTERS = 1 << 18  # unless it is longer
PLAIN_EVERY = 32  # and one in so many is rendered again without tracing

# name -> (dtype, trailing shape); N tokens, S samples, M messages
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "tokens": ("<i4", ()),  # [N]
    "kind": ("|u1", ()),  # [N]
    "sample_offsets": ("<i8", ()),  # [S+1] in tokens
    "sample_row": ("<i8", ()),  # [S] row number in the source
    "sample_messages": ("<i8", ()),  # [S+1] in messages
    "message_offsets": ("<i8", ()),  # [M] first token of each message
    "message_role": ("|u1", ()),  # [M] Kind of the role
    "message_train": ("|u1", ()),  # [M] 0 no, 1 yes, 2 unset
    "prompt_hash": ("|u1", (16,)),  # [S, 16]
    "content_hash": ("|u1", (16,)),  # [S, 16]
    "row_group": (
        "<i4",
        (),
    ),  # [R] of every row of a split source, rejected ones too: index into `groups`
}


@dataclass(frozen=True, slots=True)
class ChunkSpec:
    """What turns rows into samples; the same for all chunks of a build."""

    template: TemplateText
    special_tokens: dict[str, str]  # bos_token, eos_token, ...
    date: str
    encoder: EncoderSpec
    terminators: tuple[str, ...]  # tokens that end a turn although they open the next message
    drop_messages: bool  # drop a message that the template cannot carry, rather than its row


@dataclass(frozen=True, slots=True)
class ChunkResult:
    columns: dict[str, npt.NDArray[Any]]
    facts: dict[str, Any]  # JSON: what is counted and listed of the chunk


@dataclass(frozen=True, slots=True)
class _Kept:
    number: int
    where: str
    conversation: Conversation
    rendered: Rendered
    content_hash: bytes


class ChunkBuilder:
    """Template and tokenizer, made ready once per process."""

    def __init__(self, spec: ChunkSpec) -> None:
        self._template = ChatTemplate(spec.template, spec.special_tokens, spec.date)
        self._encoder = Encoder(spec.encoder)
        self._rules = learn_rules(self._template, spec.encoder.control_tokens, spec.terminators)
        self._compiled = CompiledTemplate(self._template, self._rules)
        self._control = ControlCheck(self._template, self._rules, spec.encoder.control_tokens)
        self._drop_messages = spec.drop_messages

    def build(self, chunk: Chunk) -> ChunkResult:
        """Turn the rows of a chunk into columns. Raises DataError only where the tokenizer backends
        disagree."""
        rejects: list[tuple[int, str, str]] = []  # row, reason, detail
        missing: list[tuple[int, str]] = []
        kept: list[_Kept] = []
        parts: list[str] = []  # of every row
        dropped_messages = 0
        for row, where, record in parse_chunk(chunk):
            parts.append("")
            try:
                if isinstance(record, DataError):
                    raise record
                parts[-1] = read_group(record, chunk.conversion, where=where)
                conversation = read_conversation(record, chunk.conversion, where=where)
            except DataError as exc:
                rejects.append((row, "malformed", str(exc)))
                continue
            try:
                conversation, rendered, reason, dropped = self._render(conversation)
                digest = content_hash(conversation)
                if rendered is not None:
                    self._check(conversation, rendered, digest)
            except TemplateError as exc:
                rejects.append((row, "unverifiable", f"{where}: {exc}"))
                continue
            if rendered is None:
                missing.append((row, reason))
            else:
                dropped_messages += dropped
                kept.append(_Kept(row, where, conversation, rendered, digest))
        columns, checked = self._columns(kept, rejects)
        facts = {
            "rows": len(parts),
            "samples": len(columns["sample_row"]),
            "tokens": len(columns["tokens"]),
            "rejects": sorted(rejects),
            "unrendered": missing,
            "messages_dropped": dropped_messages,
            "messages_untrained": int((columns["message_train"] == TRAIN_NO).sum()),
            "calls_not_json": sum(calls_not_json(row.conversation) for row in kept),
            **checked,
        }
        if chunk.conversion.split_by:
            facts["groups"], columns["row_group"] = _named(parts)
        return ChunkResult(columns, facts)

    def _render(self, conversation: Conversation) -> tuple[Conversation, Rendered | None, str, int]:
        """Render until the template carries everything. Returns no rendering, and why, where it
        cannot."""
        compiled = self._compiled.render(conversation)
        if compiled is not None:
            return conversation, compiled, "", 0
        dropped = 0
        while True:
            try:
                text = self._template.render(conversation)
            except TemplateError as exc:
                return conversation, None, str(exc), dropped
            lost = dict(all_unrendered(text, conversation, self._rules))
            if not lost:
                break
            if not self._drop_messages or len(lost) == len(conversation.messages):
                return conversation, None, next(iter(lost.values())), dropped
            conversation = without_messages(conversation, lost)
            dropped += len(lost)
        rendered = self._control.check(conversation, find_spans(text, conversation, self._rules))
        return conversation, rendered, "", dropped

    def _check(self, conversation: Conversation, rendered: Rendered, digest: bytes) -> None:
        if (
            digest[0] % PLAIN_EVERY == 0
            and self._template.render_plain(conversation) != rendered.text
        ):
            raise TemplateError(
                f"the template {self._template.name!r} prints another text when it is not traced"
            )

    def _columns(
        self, kept: list[_Kept], rejects: list[tuple[int, str, str]]
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, int]]:
        try:
            encoded = self._encoder.encode([row.rendered for row in kept])
        except DataError:  # some row cannot be encoded safely: find out which, leave it out, go on
            kept = [row for row in kept if not self._cannot_encode(row, rejects)]
            encoded = self._encoder.encode([row.rendered for row in kept])
        others = [
            kept[i]
            for i in self._encoder.rows_with_other_control(encoded, [row.rendered for row in kept])
        ]
        if others := [row for row in others if not self._control_is_its_own(row)]:
            reason = (
                "the tokenizer makes other control tokens of it than of the same conversation with"
                " inert contents"
            )
            rejects += [(row.number, "unverifiable", f"{row.where}: {reason}") for row in others]
            return self._columns([row for row in kept if row not in others], rejects)
        rows = [row.rendered for row in kept]
        aligned = align(encoded, rows)
        refereed = self._cross_check(encoded, kept)
        audited = self._audit(encoded, aligned, kept)
        conversations = [row.conversation for row in kept]
        order = [(row.conversation, m.message) for row in kept for m in row.rendered.messages]
        columns: dict[str, npt.NDArray[Any]] = {
            "tokens": encoded.tokens,
            "kind": aligned.kind,
            "sample_offsets": encoded.row_offsets,
            "sample_row": np.asarray([row.number for row in kept]),
            "sample_messages": aligned.row_messages,
            "message_offsets": aligned.message_offsets,
            "message_role": np.asarray([ROLE_KINDS[c.messages[i]["role"]] for c, i in order]),
            "message_train": np.asarray(
                [TRAIN_UNSET if c.train[i] is None else int(bool(c.train[i])) for c, i in order]
            ),
            "prompt_hash": np.frombuffer(b"".join(map(prompt_hash, conversations)), np.uint8),
            "content_hash": np.frombuffer(b"".join(row.content_hash for row in kept), np.uint8),
        }
        typed = {
            name: np.ascontiguousarray(columns[name].reshape(-1, *tail), dtype=dtype)
            for name, (dtype, tail) in COLUMNS.items()
            if name in columns
        }
        return typed, {
            "rows_slow_path": encoded.rows_slow_path,
            "rows_cross_checked": refereed,
            "rows_audited": audited,
        }

    def _control_is_its_own(self, row: _Kept) -> bool:
        """Ask the tokenizer itself: what a template prints can lie in its vocabulary otherwise than
        it is written."""
        inert = self._template.render_plain(self._control.inert(row.conversation))
        expected, ids = (
            np.asarray(found)
            for found in (self._encoder.ids_of(inert), self._encoder.encode([row.rendered]).tokens)
        )
        return np.array_equal(
            *(found[self._encoder.is_control[found]] for found in (expected, ids))
        )

    def _cannot_encode(self, row: _Kept, rejects: list[tuple[int, str, str]]) -> bool:
        try:
            self._encoder.encode([row.rendered])
        except DataError as exc:
            rejects.append((row.number, "unverifiable", f"{row.where}: {exc}"))
            return True
        return False

    def _cross_check(self, encoded: Encoded, kept: list[_Kept]) -> int:
        """Compare a sample of rows with the Hugging Face tokenizer, id by id."""
        checked = 0
        for index, row in enumerate(kept):
            if row.content_hash[0] % REFEREE_EVERY:
                continue
            ids = encoded.tokens[encoded.row_offsets[index] : encoded.row_offsets[index + 1]]
            if not self._encoder.agrees_with_reference(row.rendered, ids):
                raise DataError(
                    f"{row.where}: gigatoken and the Hugging Face tokenizer give different ids for"
                    ' this row; set tokenizer.backend = "transformers" and report the row'
                )
            checked += 1
        return checked

    def _audit(self, encoded: Encoded, aligned: Aligned, kept: list[_Kept]) -> int:
        """Make the mask of a sample of rows a second time: prep/rendering/mask_audit.py. Raises
        DataError where they differ.

        Returns how many of the rows drawn by hash were compared. The one row more of every chunk is
        not counted: a manifest says nothing of chunks.
        """
        drawn = {i for i, row in enumerate(kept) if row.content_hash[0] % AUDIT_EVERY == 0}
        chosen = drawn | (
            {min(range(len(kept)), key=lambda i: kept[i].content_hash)} if kept else set()
        )
        # a text of many megabytes costs renders by the second, and the Hugging Face tokenizer
        # memory by the gigabyte
        chosen = {i for i in chosen if len(kept[i].rendered.text) <= AUDIT_CHARACTERS}
        checked = 0
        for index in sorted(chosen):
            row, tokens = kept[index], slice(*encoded.row_offsets[index : index + 2])
            try:
                found = list(
                    windows(self._template, row.conversation, row.rendered.text, self._rules)
                )
            except NotComparableError:
                continue
            ids, offsets = self._encoder.reference(row.rendered)
            trained = np.isin(aligned.kind[tokens] & KIND_MASK, ASSISTANT_KINDS)
            same = np.array_equal(ids, encoded.tokens[tokens])
            token = first_difference(found, trained, offsets) if same else 0
            if token is not None:
                raise DataError(_audit_message(row, token, offsets, trained))
            checked += index in drawn
        return checked


def _audit_message(
    row: _Kept, token: int, offsets: npt.NDArray[np.int64], trained: npt.NDArray[np.bool_]
) -> str:
    first, last = offsets[token].tolist()
    text = row.rendered.text
    return (
        f"{row.where}: two ways to find what is trained disagree at token {token},"
        f" {text[first:last]!r} (behind {text[max(first - 30, 0) : first]!r}): by the marks of one"
        f" render it is {'trained' if trained[token] else 'not trained'}, by comparing renders it"
        ' is not so. Report the row and its template; rows.on_error = "skip" does not help, a'
        " mask must be certain"
    )


def _named(parts: list[str]) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Return the different parts in order, and of every row which of them it belongs to, int32
    [R]."""
    names = sorted(set(parts))
    index = {name: number for number, name in enumerate(names)}
    return names, np.asarray([index[part] for part in parts], np.dtype("<i4"))
