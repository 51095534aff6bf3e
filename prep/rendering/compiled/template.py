"""A chat template compiled for a shape of conversation: fixed strings with slots, filled without
running Jinja.

A shape is the sequence of roles. The template runs once on stand-in contents that write down what
it asks of them (`prep/rendering/compiled/recorded_str.py`); its output gives the pieces, the spans,
and guards: the questions and answers that other contents must repeat. A conversation whose contents
give another answer, or that has more than roles and contents, takes the traced way through Jinja.
So does every shape that cannot be followed, or that a second set of stand-ins contradicts.

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
_MAX_MESSAGES = 64  # longer conversations are too rare to share a shape


@dataclass(frozen=True, slots=True)
class RoleSequenceTemplate:
    """Rendered pieces: text, or the index of the message whose content stands there."""

    pieces: tuple[str | int, ...]
    spans: tuple[
        tuple[int, int, Kind, int, int, int, bool], ...
    ]  # as Span, positions as piece boundaries
    messages: tuple[tuple[int, int], ...]  # as RenderedMessage, start as a piece boundary
    guards: tuple[Guard, ...]
    plain_contents: tuple[int, ...]  # messages whose content may not hold inline reasoning
    control: tuple[str, ...]  # the template's control tokens, whatever the contents

    def render(self, conversation: Conversation) -> Rendered | None:
        """Return what the template prints, or None where the contents give a guard another
        answer."""
        contents = [message["content"] for message in conversation.messages]
        for message, question, argument, answer in self.guards:
            if QUESTIONS[question](contents[message], argument) is not answer:
                return None
        if any("<think>" in contents[message] for message in self.plain_contents):
            return None
        texts = [piece if isinstance(piece, str) else contents[piece] for piece in self.pieces]
        at = [0, *accumulate(map(len, texts))]
        spans = [
            Span(at[start], at[end], kind, message, at[first], at[last], is_text)
            for start, end, kind, message, first, last, is_text in self.spans
            if at[start] < at[end]
        ]
        messages = [RenderedMessage(m, at[start]) for m, start in self.messages]
        return Rendered("".join(texts), spans, messages, self.control)


class CompiledTemplate:
    """The shapes of one template, compiled when they are first met."""

    def __init__(self, template: ChatTemplate, rules: SpanRules) -> None:
        self._template = template
        self._rules = rules
        self._shapes: dict[tuple[str, ...], RoleSequenceTemplate | None] = {}

    def render(self, conversation: Conversation) -> Rendered | None:
        """Return what the template prints, or None where only Jinja can say."""
        if conversation.tools is not None or len(conversation.messages) > _MAX_MESSAGES:
            return None
        if any(len(message) != 2 for message in conversation.messages):
            return None
        roles = tuple(message["role"] for message in conversation.messages)
        if roles not in self._shapes:
            self._shapes[roles] = self._compile(roles)
        shape = self._shapes[roles]
        return None if shape is None else shape.render(conversation)

    def _compile(self, roles: tuple[str, ...]) -> RoleSequenceTemplate | None:
        probe = _conversation(roles, _STAND_INS[0])
        record = Record()
        messages = [
            {
                "role": role,
                "content": RecordedStr.of(
                    text, (Mark(0, len(text), index, "content", 0),), record, index
                ),
            }
            for index, (role, text) in enumerate((m["role"], m["content"]) for m in probe.messages)
        ]
        try:
            text = self._template.render_messages(messages, RecordingEnvironment)
            if not isinstance(text, Traced) or not record.followed:
                return None
            if unrendered_fields(text, probe, self._rules) is not None:
                return None
            rendered = find_spans(text, probe, self._rules)
            rendered = replace(rendered, control=tuple(self._rules.control.findall(rendered.text)))
            shape = _shape(text, rendered, probe, tuple(sorted(record.guards, key=repr)))
            return (
                shape
                if shape and all(self._agrees(shape, _conversation(roles, s)) for s in _STAND_INS)
                else None
            )
        except TemplateError:
            return None

    def _agrees(self, shape: RoleSequenceTemplate, conversation: Conversation) -> bool:
        rendered = shape.render(conversation)
        text = self._template.render(conversation)
        control = tuple(self._rules.control.findall(text))  # of stand-ins, which hold none
        return rendered == replace(find_spans(text, conversation, self._rules), control=control)


def _conversation(roles: tuple[str, ...], text: str) -> Conversation:
    messages = tuple(
        {"role": role, "content": text.format(index)} for index, role in enumerate(roles)
    )
    return Conversation(messages=messages, tools=None, train=(None,) * len(roles))


def _shape(
    text: Traced, rendered: Rendered, probe: Conversation, guards: tuple[Guard, ...]
) -> RoleSequenceTemplate | None:
    order = [message.message for message in rendered.messages]
    if order != sorted(order):
        return None  # empty contents would tie, and a tie goes by the order of the conversation
    slots = sorted(mark for mark in text.marks if mark.message >= 0)
    for mark in slots:
        if (mark.source_start, mark.end - mark.start) != (
            0,
            len(probe.messages[mark.message]["content"]),
        ):
            return None  # a content that is printed in part or changed is no slot
    cuts = {0, len(rendered.text)}
    for span in rendered.spans:
        cuts |= {span.start, span.end, span.region_start, span.region_end}
    cuts |= {message.start for message in rendered.messages}
    pieces: list[str | int] = []
    starts: list[int] = []
    cursor = 0
    ending = Mark(len(rendered.text), len(rendered.text), -1, "", 0)
    for mark in [*slots, ending]:
        end = mark.start
        if end < cursor:
            return None  # slots that overlap
        inner = sorted({cursor, end, *(cut for cut in cuts if cursor < cut < end)})
        for first, last in pairwise(inner):
            starts.append(first)
            pieces.append(rendered.text[first:last])
        if mark is not ending:
            if any(mark.start < cut < mark.end for cut in cuts):
                return None
            starts.append(mark.start)
            pieces.append(mark.message)
            cursor = mark.end
    boundary = {position: index for index, position in enumerate([*starts, len(rendered.text)])}
    return RoleSequenceTemplate(
        pieces=tuple(pieces),
        spans=tuple(
            (
                boundary[span.start],
                boundary[span.end],
                span.kind,
                span.message,
                boundary[span.region_start],
                boundary[span.region_end],
                span.is_text,
            )
            for span in rendered.spans
        ),
        messages=tuple((message.message, boundary[message.start]) for message in rendered.messages),
        guards=guards,
        plain_contents=tuple(
            index for index, m in enumerate(probe.messages) if m["role"] == "assistant"
        ),
        control=rendered.control,
    )
