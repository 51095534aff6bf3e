"""A chat template compiled for one sequence of roles: fixed strings with slots for the contents.

The template runs once on stand-in contents that record what it asks of them (recorded_str.py). Its
output gives the pieces, the spans, and guards: the questions, with the answers that other contents
must give too. A conversation that gives another answer, or has more than roles and contents, is
rendered by Jinja and traced, which takes ten times as long (60 us a row instead of 6). So is every
sequence of roles that cannot be recorded, or that a second set of stand-ins contradicts.

    pieces   <|user|>\\n  [0]  \\n<|assistant|>\\n  [1]  <|endoftext|>      guards: none
    spans                [USER]                   [ASSISTANT][TERMINATOR]
"""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from prep.conversations.conversation import Conversation
from prep.rendering.compiled.environment import RecordingEnvironment
from prep.rendering.compiled.recorded_str import QUESTIONS, Guard, Record, RecordedStr
from prep.rendering.coverage import unrendered_fields
from prep.rendering.spans import Rendered, RenderedMessage, Span, find_spans
from prep.rendering.template import ChatTemplate
from prep.rendering.traced_str import Mark, Traced
from prep.rendering.turns import SpanRules
from shared.errors import TemplateError
from shared.shard_format import Kind

_STAND_INS = (
    "Stand-in {}: a short line",
    "Zweiter Text {},\n\nmit Absatz, caf\u00e9 und \u6771\u4eac",
)
# Longer conversations are too rare to share a sequence of roles.
_MAX_MESSAGES = 64


@dataclass(frozen=True, slots=True)
class RoleSequenceTemplate:
    """A rendering with slots. Positions are numbers of pieces: piece k starts at position k."""

    pieces: tuple[str | int, ...]  # text, or the index of the message whose content is the piece
    spans: tuple[tuple[int, int, Kind, int, int, int, bool], ...]  # fields as in Span
    messages: tuple[tuple[int, int], ...]  # fields as in RenderedMessage
    guards: tuple[Guard, ...]
    no_thinking_in: tuple[int, ...]  # messages whose content may not contain inline reasoning
    control: tuple[str, ...]  # the template's control tokens, whatever the contents

    def render(self, conversation: Conversation) -> Rendered | None:
        """Return what the template prints, or None if the contents give a guard another answer."""
        contents = [message["content"] for message in conversation.messages]
        for message, question, argument, answer in self.guards:
            if QUESTIONS[question](contents[message], argument) is not answer:
                return None
        # inline reasoning has separate spans, which no stand-in has
        if any("<think>" in contents[message] for message in self.no_thinking_in):
            return None
        texts = [piece if isinstance(piece, str) else contents[piece] for piece in self.pieces]
        at = [0, *accumulate(map(len, texts))]  # the offset of every position
        spans = [
            Span(at[start], at[end], kind, message, at[first], at[last], is_text)
            for start, end, kind, message, first, last, is_text in self.spans
            if at[start] < at[end]
        ]
        messages = [RenderedMessage(m, at[start]) for m, start in self.messages]
        return Rendered("".join(texts), spans, messages, self.control)


class CompiledTemplate:
    """One template, compiled for a sequence of roles when the first conversation has it."""

    def __init__(self, template: ChatTemplate, rules: SpanRules) -> None:
        self._template = template
        self._rules = rules
        self._compiled: dict[tuple[str, ...], RoleSequenceTemplate | None] = {}

    def render(self, conversation: Conversation) -> Rendered | None:
        """Return what the template prints, or None if only Jinja can tell."""
        if conversation.tools is not None or len(conversation.messages) > _MAX_MESSAGES:
            return None
        if any(len(message) != 2 for message in conversation.messages):
            return None
        roles = tuple(message["role"] for message in conversation.messages)
        if roles not in self._compiled:
            self._compiled[roles] = self._compile(roles)
        compiled = self._compiled[roles]
        return None if compiled is None else compiled.render(conversation)

    def _compile(self, roles: tuple[str, ...]) -> RoleSequenceTemplate | None:
        # Takes as long as 40 (chatml) to 110 (qwen3) rows take through Jinja, most of it in Jinja's
        # compiler. Rows share few sequences of roles: questions with one answer have one or two.
        probe = _conversation(roles, _STAND_INS[0])
        record = Record()
        messages = []
        for index, message in enumerate(probe.messages):
            mark = Mark(0, len(message["content"]), index, "content", 0)
            content = RecordedStr.of(message["content"], (mark,), record, index)
            messages.append({"role": message["role"], "content": content})
        try:
            text = self._template.render_messages(messages, RecordingEnvironment)
            if not isinstance(text, Traced) or not record.followed:
                return None
            if unrendered_fields(text, probe, self._rules) is not None:
                return None
            compiled = _cut_into_pieces(
                text, self._spans_of(probe, text), probe, tuple(sorted(record.guards, key=repr))
            )
            if compiled is None:
                return None
            # The recording is trusted only as far as Jinja confirms it, on both sets of stand-ins:
            # they differ in length, in script, and in whether they hold a newline.
            for stand_in in _STAND_INS:
                example = _conversation(roles, stand_in)
                expected = self._spans_of(example, self._template.render(example))
                if compiled.render(example) != expected:
                    return None
            return compiled
        except TemplateError:
            return None

    def _spans_of(self, conversation: Conversation, text: Traced) -> Rendered:
        """Return the spans of stand-ins; these hold no control token, so all are the template's."""
        rendered = find_spans(text, conversation, self._rules)
        return replace(rendered, control=tuple(self._rules.control.findall(rendered.text)))


def _conversation(roles: tuple[str, ...], text: str) -> Conversation:
    messages = tuple(
        {"role": role, "content": text.format(index)} for index, role in enumerate(roles)
    )
    return Conversation(messages=messages, tools=None, train=(None,) * len(roles))


def _cut_into_pieces(
    text: Traced, rendered: Rendered, probe: Conversation, guards: tuple[Guard, ...]
) -> RoleSequenceTemplate | None:
    """Return the rendering of a probe with slots for its contents; None if a slot does not print a
    content whole, or a span begins or ends within one."""
    order = [message.message for message in rendered.messages]
    if order != sorted(order):
        return None  # two empty contents would tie, and find_spans breaks ties by message number
    # A slot is a content that is printed whole and unchanged. `content[:10]` is none: its piece
    # would depend on the content.
    slots = sorted(mark for mark in text.marks if mark.message >= 0)
    for mark in slots:
        content = probe.messages[mark.message]["content"]
        if (mark.source_start, mark.end - mark.start) != (0, len(content)):
            return None
    # Spans, regions and messages are stored as numbers of pieces, because offsets depend on the
    # contents. So every one of their bounds has to be the bound of a piece.
    bounds = {0, len(rendered.text), *(message.start for message in rendered.messages)}
    for span in rendered.spans:
        bounds |= {span.start, span.end, span.region_start, span.region_end}
    pieces: list[str | int] = []
    starts: list[int] = []
    cursor = 0
    end_of_text = Mark(len(rendered.text), len(rendered.text), -1, "", 0)
    for mark in [*slots, end_of_text]:
        if mark.start < cursor or any(mark.start < bound < mark.end for bound in bounds):
            return None  # slots that overlap, or a bound within a slot
        inner = sorted({cursor, mark.start, *(b for b in bounds if cursor < b < mark.start)})
        starts += inner[:-1]
        pieces += [rendered.text[first:last] for first, last in pairwise(inner)]
        if mark is not end_of_text:
            starts.append(mark.start)
            pieces.append(mark.message)
            cursor = mark.end
    piece_at = {start: index for index, start in enumerate([*starts, len(rendered.text)])}
    return RoleSequenceTemplate(
        pieces=tuple(pieces),
        spans=tuple(
            (
                piece_at[span.start],
                piece_at[span.end],
                span.kind,
                span.message,
                piece_at[span.region_start],
                piece_at[span.region_end],
                span.is_text,
            )
            for span in rendered.spans
        ),
        messages=tuple((message.message, piece_at[message.start]) for message in rendered.messages),
        guards=guards,
        no_thinking_in=tuple(
            index for index, m in enumerate(probe.messages) if m["role"] == "assistant"
        ),
        control=rendered.control,
    )
