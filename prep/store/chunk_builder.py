"""One chunk of raw rows -> columns of the sample store. Runs in a worker process and knows no other
chunk.

    row -> conversation -> rendering with spans -> ids with byte ranges -> kinds -> columns
        malformed       unrendered,              unverifiable
                        unverifiable

Every row becomes a sample, a reject (malformed, or its spans or its control tokens cannot be
proved), or an unrendered row (the template would drop some of it). Rejects and unrendered rows are
listed with their reasons. All checks that are drawn by hash draw the same rows in every build.
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

# One row in 128, drawn by its content hash, is encoded by the Hugging Face tokenizer too, and its
# mask is made by a second method. Checking a row takes as long as building sixty (3 ms against
# 50 us for GSM8K's), so that a build that checked every row would take forty times as long.
CROSS_CHECK_EVERY = 128
# The mask of a longer row is not made again: of a text of many megabytes each rendering takes
# seconds, and the Hugging Face tokenizer takes gigabytes of memory.
AUDIT_CHARACTERS = 1 << 18
# One row in 32 is rendered without tracing too, which must not change its text.
PLAIN_EVERY = 32

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
    # [R] for every row of a split source, rejected ones too: index into the fact `groups`
    "row_group": ("<i4", ()),
}


@dataclass(frozen=True, slots=True)
class ChunkSpec:
    """What turns rows into samples; the same for all chunks of a build."""

    template: TemplateText
    special_tokens: dict[str, str]  # bos_token, eos_token, ...
    date: str
    encoder: EncoderSpec
    terminators: tuple[str, ...]  # tokens that end a turn although they open the next message
    drop_messages: bool  # leave out a message that the template does not print, not its row


@dataclass(frozen=True, slots=True)
class ChunkResult:
    columns: dict[str, npt.NDArray[Any]]
    facts: dict[str, Any]  # JSON: counts and lists


@dataclass(frozen=True, slots=True)
class _Row:
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
        """Turn the rows of a chunk into columns. Raises DataError only if two methods disagree
        about the ids or the mask of a row."""
        rejects: list[tuple[int, str, str]] = []  # row, reason, detail
        unrendered: list[tuple[int, str]] = []  # row, reason
        groups: list[str] = []  # of every row
        rows: list[_Row] = []
        messages_dropped = 0
        for number, where, record in parse_chunk(chunk):
            groups.append("")
            try:
                if isinstance(record, DataError):
                    raise record
                groups[-1] = read_group(record, chunk.conversion, where=where)
                conversation = read_conversation(record, chunk.conversion, where=where)
            except DataError as exc:
                rejects.append((number, "malformed", str(exc)))
                continue
            try:
                conversation, rendered, reason, dropped = self._render(conversation)
                digest = content_hash(conversation)
                if (
                    rendered is not None
                    and digest[0] % PLAIN_EVERY == 0
                    and self._template.render_plain(conversation) != rendered.text
                ):
                    raise TemplateError(
                        f"the template {self._template.name!r} prints another text when it is not"
                        " traced"
                    )
            except TemplateError as exc:
                rejects.append((number, "unverifiable", f"{where}: {exc}"))
                continue
            if rendered is None:
                unrendered.append((number, reason))
            else:
                messages_dropped += dropped
                rows.append(_Row(number, where, conversation, rendered, digest))
        rows, encoded = self._encode(rows, rejects)
        aligned = align(encoded, [row.rendered for row in rows])
        rows_cross_checked, rows_audited = self._cross_check(encoded, aligned, rows)
        columns = _columns(encoded, aligned, rows)
        facts: dict[str, Any] = {
            "rows": len(groups),
            "samples": len(rows),
            "tokens": len(encoded.tokens),
            "rejects": sorted(rejects),
            "unrendered": unrendered,
            "messages_dropped": messages_dropped,
            "messages_untrained": int((columns["message_train"] == TRAIN_NO).sum()),
            "calls_not_json": sum(calls_not_json(row.conversation) for row in rows),
            "rows_slow_path": encoded.rows_slow_path,
            "rows_cross_checked": rows_cross_checked,
            "rows_audited": rows_audited,
        }
        if chunk.conversion.split_by:
            names = sorted(set(groups))
            number_of = {name: number for number, name in enumerate(names)}
            facts["groups"] = names
            columns["row_group"] = np.asarray([number_of[name] for name in groups], np.dtype("<i4"))
        return ChunkResult(columns, facts)

    def _render(self, conversation: Conversation) -> tuple[Conversation, Rendered | None, str, int]:
        """Render a conversation, without the messages that the template does not print if they may
        be dropped.

        Returns (conversation as rendered, rendering, reason, number of dropped messages). If the
        template does not print everything, there is a reason instead of a rendering.
        """
        compiled = self._compiled.render(conversation)
        if compiled is not None:
            return conversation, compiled, "", 0
        dropped = 0
        while True:
            try:
                text = self._template.render(conversation)
            except TemplateError as exc:
                return conversation, None, str(exc), dropped
            missing = dict(all_unrendered(text, conversation, self._rules))
            if not missing:
                break
            if not self._drop_messages or len(missing) == len(conversation.messages):
                return conversation, None, next(iter(missing.values())), dropped
            # the rest may be printed otherwise without these messages, so look again
            conversation = without_messages(conversation, missing)
            dropped += len(missing)
        rendered = self._control.check(conversation, find_spans(text, conversation, self._rules))
        return conversation, rendered, "", dropped

    def _encode(
        self, rows: list[_Row], rejects: list[tuple[int, str, str]]
    ) -> tuple[list[_Row], Encoded]:
        """Encode the rows of a chunk at once; a row that cannot be encoded safely becomes a
        reject. Returns the other rows."""
        try:
            encoded = self._encoder.encode([row.rendered for row in rows])
        except DataError:
            # one row spoils the batch: encode them one by one to find it
            safe = []
            for row in rows:
                try:
                    self._encoder.encode([row.rendered])
                    safe.append(row)
                except DataError as exc:
                    rejects.append((row.number, "unverifiable", f"{row.where}: {exc}"))
            rows = safe
            encoded = self._encoder.encode([row.rendered for row in rows])
        # The control ids must be those that the template printed. A tokenizer may spell a control
        # token differently from the template, so the last word is what it makes of the same
        # conversation with inert contents.
        injected = []
        is_control = self._encoder.is_control
        rendered = [row.rendered for row in rows]
        for index in self._encoder.rows_with_other_control(encoded, rendered):
            inert = self._template.render_plain(self._control.inert(rows[index].conversation))
            expected = np.asarray(self._encoder.ids_of(inert), np.int32)
            ids = encoded.tokens[slice(*encoded.row_offsets[index : index + 2])]
            if not np.array_equal(expected[is_control[expected]], ids[is_control[ids]]):
                injected.append(rows[index])
        if not injected:
            return rows, encoded
        reason = (
            "the tokenizer makes other control tokens of it than of the same conversation with"
            " inert contents"
        )
        rejects += [(row.number, "unverifiable", f"{row.where}: {reason}") for row in injected]
        return self._encode([row for row in rows if row not in injected], rejects)

    def _cross_check(self, encoded: Encoded, aligned: Aligned, rows: list[_Row]) -> tuple[int, int]:
        """Make the ids and the mask of a sample of rows a second time: ids by the Hugging Face
        tokenizer, masks by prep/rendering/mask_audit.py. Raises DataError if they differ.

        Returns how many rows were drawn by hash, and of how many of these the mask was compared.
        The mask of one more row of every chunk is compared, so that small sources have one too. It
        is not counted, because a manifest does not know of chunks.
        """
        drawn = {i for i, row in enumerate(rows) if row.content_hash[0] % CROSS_CHECK_EVERY == 0}
        one_more = {min(range(len(rows)), key=lambda i: rows[i].content_hash)} if rows else set()
        audited = 0
        for index in sorted(drawn | one_more):
            row, tokens = rows[index], slice(*encoded.row_offsets[index : index + 2])
            ids, text = encoded.tokens[tokens], row.rendered.text
            if index in drawn and not self._encoder.agrees_with_reference(row.rendered, ids):
                raise DataError(
                    f"{row.where}: gigatoken and the Hugging Face tokenizer give different ids for"
                    ' this row; set tokenizer.backend = "transformers" and report the row'
                )
            if len(text) > AUDIT_CHARACTERS:
                continue
            try:
                expected = list(windows(self._template, row.conversation, text, self._rules))
            except NotComparableError:
                continue
            reference_ids, offsets = self._encoder.reference(row.rendered)
            trained = np.isin(aligned.kind[tokens] & KIND_MASK, ASSISTANT_KINDS)
            same = np.array_equal(reference_ids, ids)
            token = first_difference(expected, trained, offsets) if same else 0
            if token is not None:
                first, last = offsets[token].tolist()
                raise DataError(
                    f"{row.where}: two methods disagree about the mask at token {token},"
                    f" {text[first:last]!r} (after {text[max(first - 30, 0) : first]!r}): the"
                    " marks of one rendering say"
                    f" {'trained' if trained[token] else 'not trained'}, a comparison of renderings"
                    " says the opposite. Report the row and its template;"
                    ' rows.on_error = "skip" does not help, a mask must be certain'
                )
            audited += index in drawn
        return len(drawn), audited


def _columns(encoded: Encoded, aligned: Aligned, rows: list[_Row]) -> dict[str, npt.NDArray[Any]]:
    messages = [(row.conversation, m.message) for row in rows for m in row.rendered.messages]
    columns: dict[str, npt.NDArray[Any]] = {
        "tokens": encoded.tokens,
        "kind": aligned.kind,
        "sample_offsets": encoded.row_offsets,
        "sample_row": np.asarray([row.number for row in rows]),
        "sample_messages": aligned.row_messages,
        "message_offsets": aligned.message_offsets,
        "message_role": np.asarray([ROLE_KINDS[c.messages[i]["role"]] for c, i in messages]),
        "message_train": np.asarray(
            [TRAIN_UNSET if c.train[i] is None else int(bool(c.train[i])) for c, i in messages]
        ),
        "prompt_hash": np.frombuffer(
            b"".join(prompt_hash(row.conversation) for row in rows), np.uint8
        ),
        "content_hash": np.frombuffer(b"".join(row.content_hash for row in rows), np.uint8),
    }
    return {
        name: np.ascontiguousarray(columns[name].reshape(-1, *tail), dtype=dtype)
        for name, (dtype, tail) in COLUMNS.items()
        if name in columns
    }
