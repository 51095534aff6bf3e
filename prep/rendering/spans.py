"""From a traced rendering to spans: who wrote which characters, and where each turn of the
assistant begins and ends.

    <|user|>\\nHi\\n<|assistant|>\\nYo.<|endoftext|>\\n
             USER               |ASSISTANT|TERMINATOR
                                [---- region ----)       what the model must produce in this turn

If the template has {% generation %} blocks, they are the regions. If not, a region begins after
the generation prompt (without a prompt: at the turn's first character) and ends with the turn's
terminator: the first control token after its text, provided that it is one that ends turns
(prep/rendering/turns.py). Everything else is TEMPLATE. What cannot be proved is an error.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from prep.conversations.conversation import Conversation
from prep.rendering.intervals import Intervals, outermost
from prep.rendering.template import ChatTemplate
from prep.rendering.traced_str import GENERATION, Mark, Traced
from prep.rendering.turns import SpanRules
from shared.errors import TemplateError
from shared.shard_format import Kind

ROLE_KINDS = {
    "system": Kind.SYSTEM,
    "developer": Kind.SYSTEM,
    "user": Kind.USER,
    "assistant": Kind.ASSISTANT,
    "tool": Kind.TOOL,
    "function": Kind.TOOL,
    "environment": Kind.TOOL,
    "ipython": Kind.TOOL,
}
FIELD_KINDS = {
    "content": Kind.ASSISTANT,
    "reasoning_content": Kind.REASONING,
    "tool_calls": Kind.TOOL_CALL,
    "function_calls": Kind.TOOL_CALL,
}
TEXT_FIELDS = frozenset((*FIELD_KINDS, "functions"))  # the fields that hold a message's text
_INLINE_REASONING = re.compile(r"<think>.*?</think>", re.DOTALL)


class Span(NamedTuple):
    """Characters [start, end) of a rendering."""

    start: int
    end: int
    kind: Kind
    message: int  # position of the message in the rendering; -1 for none
    region_start: int
    region_end: int
    is_text: bool  # written by the conversation: may not become control tokens


class RenderedMessage(NamedTuple):
    message: int  # its index in the conversation
    start: int  # first character after the message before it


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    spans: list[Span]  # ordered, not overlapping
    messages: list[RenderedMessage]  # in the order of the text
    # the control tokens that the template printed, in order: no others may be among the ids
    control: tuple[str, ...] = ()


def find_spans(text: Traced, conversation: Conversation, rules: SpanRules) -> Rendered:
    """Return the spans of a rendering. Raises TemplateError if they cannot be proved."""
    # 1. Sort the marks: those of a message's own text, and those of other text of the conversation
    # (tools, names, ids), which is TEMPLATE to the loss but may not become a control token either.
    marks_of: dict[int, list[Mark]] = {}
    foreign_marks: list[Mark] = []
    for mark in text.marks:
        if mark.message == GENERATION:
            continue
        if mark.message >= 0 and mark.field.split("/", 1)[0] in TEXT_FIELDS:
            marks_of.setdefault(mark.message, []).append(mark)
            source = conversation.messages[mark.message].get(mark.field)
            source_end = mark.source_start + mark.end - mark.start
            # A mark is a claim about characters. A template can only break it by an operation that
            # traced_str.py does not know; this comparison is what turns that into an error.
            if (
                isinstance(source, str)
                and mark.source_start >= 0
                and not text.startswith(source[mark.source_start : source_end], mark.start)
            ):
                raise TemplateError(
                    f"messages[{mark.message}].{mark.field} is not where the template seemed to"
                    " print it"
                )
        elif mark.start < mark.end:
            foreign_marks.append(mark)
    # 2. What is printed of an assistant after the end of its turn is foreign, or an error.
    for index, marks in marks_of.items():
        marks.sort()
        if conversation.messages[index]["role"] == "assistant":
            foreign_marks += _take_beyond_the_turn(text, index, marks, rules)
    foreign_marks.sort()
    foreign_ranges = Intervals((mark.start, mark.end) for mark in foreign_marks)
    blocks = (
        _generation_regions(text, marks_of, conversation, rules)
        if rules.has_generation_marks
        else None
    )
    # 3. Walk over the messages in the order of the text, which need not be that of the conversation
    # (a system prompt in the last question); empty texts at one position keep the latter. Other
    # roles become a span for each mark. An assistant's turn becomes a region that is covered whole.
    spans = [Span(m.start, m.end, Kind.TEMPLATE, -1, m.start, m.end, True) for m in foreign_marks]
    messages: list[RenderedMessage] = []
    previous_end = 0
    order = sorted(marks_of, key=lambda index: (min(mark.start for mark in marks_of[index]), index))
    for position, index in enumerate(order):
        marks = marks_of[index]
        messages.append(RenderedMessage(index, previous_end))
        if conversation.messages[index]["role"] != "assistant":
            kind = ROLE_KINDS[conversation.messages[index]["role"]]
            spans += [
                Span(m.start, m.end, kind, position, m.start, m.end, True)
                for m in marks
                if m.start < m.end
            ]
            previous_end = max(previous_end, marks[-1].end)
            continue
        following = marks_of[order[position + 1]] if position + 1 < len(order) else []
        regions = (
            [_region_around(text, marks, following, previous_end, foreign_ranges, rules)]
            if blocks is None
            else blocks[index]
        )
        for start, end in regions:
            near = [*marks, *foreign_marks[foreign_ranges.starting_in(start, end)]]
            inside = sorted(mark for mark in near if start <= mark.start and mark.end <= end)
            spans += _turn_spans(text, position, inside, (start, end), rules)
        previous_end = max(previous_end, regions[-1][1])
    return Rendered(str.__getitem__(text, slice(None)), _without_overlaps(spans), messages)


def ends_turns(template: ChatTemplate, rules: SpanRules) -> bool:
    """Say whether an assistant's turn ever ends in a token that a model can learn to stop with."""
    roles = ("user", "assistant", "user", "assistant")
    messages = tuple({"role": role, "content": role} for role in roles)
    for count in (4, 2):
        conversation = Conversation(messages[:count], None, (None,) * count)
        try:
            spans = find_spans(template.render(conversation), conversation, rules).spans
        except TemplateError:
            continue
        return any(span.kind == Kind.TERMINATOR for span in spans)
    return True  # it refuses plain conversations: its rows will tell


def _take_beyond_the_turn(text: str, index: int, marks: list[Mark], rules: SpanRules) -> list[Mark]:
    """Remove the marks after the end of an assistant's turn from its `marks`, which are in order,
    and return them.

    A tool's message may repeat the name of the call that it answers. The assistant's text, printed
    again, would be trained outside its turn, or twice: that is refused.
    """
    # Two texts of one turn with a terminator between them are two turns. Within a turn, two marks
    # of a field that share characters of the field mean that they are printed twice.
    printed: dict[str, list[tuple[int, int]]] = {}  # field -> ranges of its text
    end = marks[0].end
    for position, mark in enumerate(marks):
        if mark.start > end and _turn_ends(text, end, mark.start, rules):
            beyond = marks[position:]
            del marks[position:]
            repeated = next((m for m in beyond if not m.field.startswith("tool_calls")), None)
            if repeated is not None:
                raise TemplateError(
                    f"the template prints messages[{index}].{repeated.field} outside its own turn"
                )
            return [m for m in beyond if m.start < m.end]
        end = max(end, mark.end)
        if mark.source_start >= 0 and not mark.field.startswith("tool_calls"):
            printed.setdefault(mark.field, []).append(
                (mark.source_start, mark.source_start + mark.end - mark.start)
            )
    for field, ranges in printed.items():
        if any(second[0] < first[1] for first, second in pairwise(sorted(ranges))):
            raise TemplateError(f"the template prints messages[{index}].{field} twice")
    return []


def _turn_ends(text: str, start: int, end: int, rules: SpanRules) -> bool:
    """Say whether a turn is over between two texts of an assistant: it is closed, and no generation
    prompt opens it again."""
    # if nothing is known to end turns, any control token may begin another one
    closed = [
        match.end()
        for match in rules.control.finditer(text, start, end)
        if match[0] in rules.closing or not rules.closing
    ]
    prompt = rules.generation_prompt
    if closed and not (prompt and text.find(prompt, closed[-1], end) >= 0):
        return True
    return any(text.find(opening, start, end) >= 0 for opening in rules.openings)


def _generation_regions(
    text: Traced, marks_of: dict[int, list[Mark]], conversation: Conversation, rules: SpanRules
) -> dict[int, list[tuple[int, int]]]:
    """Return for each assistant message the generation blocks that hold its text."""
    blocks = outermost((mark.start, mark.end) for mark in text.marks if mark.message == GENERATION)
    starts = sorted(mark.start for marks in marks_of.values() for mark in marks)
    # A terminator may have a separate block, directly after that of the text: TRL's training
    # templates do so. A block in which no text starts joins the one that it touches.
    for at in range(len(blocks) - 1, 0, -1):
        (before, middle), (start, end) = blocks[at - 1 : at + 1]
        if middle == start and bisect_left(starts, start) == bisect_left(starts, end):
            blocks[at - 1 : at + 1] = [(before, end)]
    ends = [end for _, end in blocks]
    prompt = rules.generation_prompt
    prompt_tokens = set(rules.control.findall(prompt))
    regions: dict[int, list[tuple[int, int]]] = {}
    for index, marks in marks_of.items():
        if conversation.messages[index]["role"] != "assistant":
            continue
        message_blocks = set()
        for mark in marks:
            at = bisect_left(ends, mark.end)
            if at == len(blocks) or blocks[at][0] > mark.start:
                raise TemplateError(
                    f"the template prints messages[{index}].{mark.field} outside its generation"
                    " block"
                )
            message_blocks.add(blocks[at])
        (start, end), *others = sorted(message_blocks)
        # The author may have put the marker into the block: a model is given it as its prompt, so
        # the region begins after it, or after the last control token that the prompt has too.
        first = marks[0].start
        opened = text.rfind(prompt, start, first) if prompt else -1
        if opened >= 0:
            start = opened + len(prompt)
        else:
            tokens = rules.control.finditer(text, start, first)
            start = max((m.end() for m in tokens if m[0] in prompt_tokens), default=start)
        regions[index] = [(start, end), *others]
    return regions


def _region_around(
    text: str,
    marks: list[Mark],
    following: list[Mark],
    floor: int,
    foreign_ranges: Intervals,
    rules: SpanRules,
) -> tuple[int, int]:
    """Return the region of a turn from its text: from the generation prompt before it to the
    terminator after it.

    Both are sought in the template's own words only, up to the nearest text of the conversation:
    somebody may have typed them there.
    """
    first, last = marks[0].start, max(mark.end for mark in marks)
    before = max((mark.end for mark in following if mark.end <= first), default=0)
    after = min((mark.start for mark in following if mark.start >= last), default=len(text))
    floor = max(floor, before, foreign_ranges.last_end(first, 0))
    limit = min(after, foreign_ranges.first_start(last, len(text)))
    start = first
    if rules.generation_prompt:
        opened = text.rfind(rules.generation_prompt, floor, first)
        start = opened + len(rules.generation_prompt) if opened >= 0 else first
    elif rules.call_opening and marks[0].field.startswith("tool_calls"):
        opened = text.rfind(rules.call_opening, floor, first + len(rules.call_opening))
        start = opened if opened >= 0 else first
    # Some other control token first, and the turn has no terminator: it ends with its text.
    stop = _terminator(text, last, limit, marks, rules)
    if stop and stop[0] in rules.closing:
        return start, _end_of_run(text, stop.end(), rules)
    if _ends_in_tool_call(marks):
        raise TemplateError(
            "the template closes a tool call without a control token, so its end cannot be proved"
        )
    return start, last


def _terminator(
    text: str, start: int, end: int, marks: list[Mark], rules: SpanRules
) -> re.Match[str] | None:
    """Return the first control token after a message's text; after a tool call, the first one
    that is known to end turns.

    Some templates close a call, and then the list of calls, with control tokens of their own.
    """
    if _ends_in_tool_call(marks):
        for match in rules.control.finditer(text, start, end):
            if match[0] in rules.closing:
                return match
    return rules.control.search(text, start, end)


def _end_of_run(text: str, end: int, rules: SpanRules) -> int:
    """Return the end of the run of terminators that continues at `end`: a model stops at the last
    one (Cohere's turns end in two)."""
    while (following := rules.control.match(text, end)) and following[0] in rules.closing:
        end = following.end()
    return end


def _ends_in_tool_call(marks: list[Mark]) -> bool:
    return max(marks, key=lambda mark: (mark.end, mark.start)).field.startswith(
        ("tool_calls", "function_calls")
    )


def _turn_spans(
    text: str, message: int, marks: list[Mark], region: tuple[int, int], rules: SpanRules
) -> Iterator[Span]:
    """Cover a region without a gap: text by its field, the template's words by their neighbour,
    the terminator last."""
    start, end = region
    pieces: list[tuple[int, int, Kind, bool]] = []
    cursor, before = start, Kind.ASSISTANT
    for mark in marks:
        kind = FIELD_KINDS.get(mark.field.split("/", 1)[0], before)
        if mark.start > cursor:
            # words between two fields belong to the one that is more than plain content
            between = kind if kind != Kind.ASSISTANT else before
            pieces.append((cursor, mark.start, between, False))
        pieces.append((max(cursor, mark.start), mark.end, kind, True))
        cursor, before = max(cursor, mark.end), kind
    stop = _terminator(text, cursor, end, marks, rules)
    # A generation block may extend into the next message: it is cut at a token that ends no turn.
    if stop and stop[0] not in rules.closing:
        end, stop = stop.start(), None
    # Without a control token at the end, the words after plain content (a newline) are what the
    # model ends its turn with; after a call or reasoning they belong to these.
    if stop:
        pieces.append((cursor, stop.start(), before, False))
        end = _end_of_run(text, stop.end(), rules)
        pieces.append((stop.start(), end, Kind.TERMINATOR, False))
    else:
        pieces.append((cursor, end, Kind.TERMINATOR if before == Kind.ASSISTANT else before, False))
    for first, last, kind, is_text in pieces:
        # <think>...</think> within an answer is reasoning; most answers have none
        if kind == Kind.ASSISTANT and is_text and text.find("<think>", first, last) >= 0:
            for match in _INLINE_REASONING.finditer(text, first, last):
                if first < match.start():
                    yield Span(first, match.start(), kind, message, start, end, is_text)
                yield Span(*match.span(), Kind.REASONING, message, start, end, is_text)
                first = match.end()
        if first < last:
            yield Span(first, last, kind, message, start, end, is_text)


def _without_overlaps(spans: list[Span]) -> list[Span]:
    """Return the spans in order. If a template prints text of a message inside its text, the span
    that starts later is cut."""
    # nearly every rendering: templates print one text after the other
    spans.sort()
    if all(a.end <= b.start for a, b in pairwise(spans)):
        return spans
    result: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, span.message < 0)):
        before = result[-1] if result else None
        if before and span.start < before.end and -1 != span.message != before.message:
            raise TemplateError(
                "the template prints the texts of two messages as one, so it cannot be proved whose"
                " it is"
            )
        start = max(span.start, before.end) if before else span.start
        if start < span.end:
            result.append(span._replace(start=start))
    return result
