"""From a traced rendering to spans: which characters are whose text, where each assistant turn
begins and ends.

    <|user|>\\nHi\\n<|assistant|>\\nYo.<|endoftext|>\\n
             USER               |ASSISTANT|TERMINATOR
                                [---- region ----)       what the model must produce in this turn

A region comes from a {% generation %} block where the template has them. Else it begins behind the
generation prompt (or at the turn's first character, where the template prints none) and ends with
the turn's terminator: the first control token behind its text, if that is one which ends turns
(prep/rendering/turns.py). All else is TEMPLATE.
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
TEXT_FIELDS = frozenset((*FIELD_KINDS, "functions"))  # the fields that carry a message's text
_INLINE_REASONING = re.compile(r"<think>.*?</think>", re.DOTALL)


class Span(NamedTuple):
    """Characters [start, end) of a rendering."""

    start: int
    end: int
    kind: Kind
    message: int  # position of the message in the rendering; -1 for none
    region_start: int
    region_end: int
    is_text: bool  # brought in by the conversation: may not hold control tokens


class RenderedMessage(NamedTuple):
    message: int  # its index in the conversation
    start: int  # first character behind the message before it


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    spans: list[Span]  # ordered, not overlapping
    messages: list[RenderedMessage]  # in the order of the text
    control: tuple[
        str, ...
    ] = ()  # the control tokens of the template, in order: no other may be among the ids


def find_spans(text: Traced, conversation: Conversation, rules: SpanRules) -> Rendered:
    """Return the spans of a rendering. Raises TemplateError where they cannot be proved."""
    own: dict[int, list[Mark]] = {}
    foreign: list[Mark] = []  # text that is no message's own: tools, names, ids
    for mark in text.marks:
        if mark.message == GENERATION:
            continue
        if mark.message >= 0 and mark.field.split("/", 1)[0] in TEXT_FIELDS:
            own.setdefault(mark.message, []).append(mark)
            _check_verbatim(text, mark, conversation)
        elif mark.start < mark.end:
            foreign.append(mark)
    for index, marks in own.items():
        marks.sort()
        if conversation.messages[index]["role"] == "assistant":
            foreign += _beyond_the_turn(text, index, marks, rules)
    foreign.sort()
    foreign_places = Intervals((mark.start, mark.end) for mark in foreign)
    order = sorted(own, key=lambda index: (min(mark.start for mark in own[index]), index))
    regions = (
        _generation_regions(text, own, conversation, rules) if rules.has_generation_marks else None
    )
    spans = [Span(m.start, m.end, Kind.TEMPLATE, -1, m.start, m.end, True) for m in foreign]
    messages: list[RenderedMessage] = []
    previous_end = 0
    for position, index in enumerate(order):
        marks = own[index]
        messages.append(RenderedMessage(index, previous_end))
        if conversation.messages[index]["role"] == "assistant":
            if regions is not None:
                found = regions[index]
            else:
                following = own[order[position + 1]] if position + 1 < len(order) else []
                floor, limit = _surroundings(text, marks, previous_end, foreign_places, following)
                found = [_region_around(text, marks, floor, limit, rules)]
            for start, end in found:
                near = [*marks, *foreign[foreign_places.starting_in(start, end)]]
                inside = sorted(mark for mark in near if start <= mark.start and mark.end <= end)
                spans += _turn_spans(text, position, inside, (start, end), rules)
            previous_end = max(previous_end, found[-1][1])
        else:
            kind = ROLE_KINDS[conversation.messages[index]["role"]]
            spans += [
                Span(m.start, m.end, kind, position, m.start, m.end, True)
                for m in marks
                if m.start < m.end
            ]
            previous_end = max(previous_end, marks[-1].end)
    return Rendered(str.__getitem__(text, slice(None)), _without_overlaps(spans), messages)


def ends_turns(template: ChatTemplate, rules: SpanRules) -> bool:
    """Say whether a turn of an assistant ever ends in something that a model can learn to end it
    with."""
    messages = [
        {"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")
    ]
    for count in (4, 2):
        conversation = Conversation(tuple(messages[:count]), None, (None,) * count)
        try:
            spans = find_spans(template.render(conversation), conversation, rules).spans
        except TemplateError:
            continue
        return any(span.kind == Kind.TERMINATOR for span in spans)
    return True  # it refuses plain conversations: its rows will tell


def _beyond_the_turn(text: str, index: int, marks: list[Mark], rules: SpanRules) -> list[Mark]:
    """Take the marks that lie behind an assistant's turn out of its `marks`, which are in order,
    and return them.

    A tool's message may repeat the name of the call that it answers. What an assistant said,
    printed again, would be trained outside its turn, or twice: that is refused.
    """
    printed: dict[str, list[tuple[int, int]]] = {}  # field -> what of its text was printed
    end = marks[0].end
    for position, mark in enumerate(marks):
        if mark.start > end and _turn_ends(text, end, mark.start, rules):
            beyond = marks[position:]
            del marks[position:]
            said = next((m for m in beyond if not m.field.startswith("tool_calls")), None)
            if said is not None:
                raise TemplateError(
                    f"the template prints messages[{index}].{said.field} outside its own turn"
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
    """Say whether an assistant's turn is over between two of its texts: it is ended, and not opened
    again."""
    # where nothing is known to end turns, any control token may begin another one
    ending = (
        found
        for found in rules.control.finditer(text, start, end)
        if found[0] in rules.closing or not rules.closing
    )
    closed = [found.end() for found in ending]
    if closed and not (
        rules.generation_prompt and text.find(rules.generation_prompt, closed[-1], end) >= 0
    ):
        return True
    return any(text.find(opening, start, end) >= 0 for opening in rules.openings)


def _surroundings(
    text: str, marks: list[Mark], floor: int, foreign: Intervals, following: list[Mark]
) -> tuple[int, int]:
    """Return the bounds of the template's own words around a message: the nearest text that a
    conversation brought."""
    first, last = min(mark.start for mark in marks), max(mark.end for mark in marks)
    before = max((mark.end for mark in following if mark.end <= first), default=0)
    behind = min((mark.start for mark in following if mark.start >= last), default=len(text))
    return max(floor, before, foreign.last_end(first, 0)), min(
        behind, foreign.first_start(last, len(text))
    )


def _check_verbatim(text: Traced, mark: Mark, conversation: Conversation) -> None:
    source = conversation.messages[mark.message].get(mark.field)
    if mark.source_start < 0 or not isinstance(source, str):
        return
    if not text.startswith(
        source[mark.source_start : mark.source_start + mark.end - mark.start], mark.start
    ):
        raise TemplateError(
            f"messages[{mark.message}].{mark.field} is not where the template seemed to print it"
        )


def _generation_regions(
    text: Traced, own: dict[int, list[Mark]], conversation: Conversation, rules: SpanRules
) -> dict[int, list[tuple[int, int]]]:
    blocks = outermost((mark.start, mark.end) for mark in text.marks if mark.message == GENERATION)
    starts = sorted(mark.start for marks in own.values() for mark in marks)
    for at in range(
        len(blocks) - 1, 0, -1
    ):  # a terminator may have a block of its own, right behind the text's
        (before, middle), (start, end) = blocks[at - 1 : at + 1]
        if middle == start and bisect_left(starts, start) == bisect_left(starts, end):
            blocks[at - 1 : at + 1] = [(before, end)]
    ends = [end for _, end in blocks]
    regions: dict[int, list[tuple[int, int]]] = {}
    for index, marks in own.items():
        if conversation.messages[index]["role"] != "assistant":
            continue
        found = set()
        for mark in marks:
            at = bisect_left(ends, mark.end)
            block = blocks[at] if at < len(blocks) and blocks[at][0] <= mark.start else None
            if block is None:
                raise TemplateError(
                    f"the template prints messages[{index}].{mark.field} outside its generation"
                    " block"
                )
            found.add(block)
        first, *others = sorted(found)
        regions[index] = [_behind_prompt(text, first, marks[0].start, rules), *others]
    return regions


def _behind_prompt(
    text: str, block: tuple[int, int], first: int, rules: SpanRules
) -> tuple[int, int]:
    """Return a generation block without the marker that its author may have put into it, before the
    `first` text."""
    start, end = block
    prompt = text.rfind(rules.generation_prompt, start, first) if rules.generation_prompt else -1
    if prompt >= 0:
        return prompt + len(rules.generation_prompt), end
    markers = set(rules.control.findall(rules.generation_prompt))
    return (
        max(
            [
                start,
                *(m.end() for m in rules.control.finditer(text, start, first) if m[0] in markers),
            ]
        ),
        end,
    )


def _region_around(
    text: str, marks: list[Mark], floor: int, limit: int, rules: SpanRules
) -> tuple[int, int]:
    first, last = marks[0].start, max(mark.end for mark in marks)
    start = first
    if rules.generation_prompt:
        found = text.rfind(rules.generation_prompt, floor, first)
        start = found + len(rules.generation_prompt) if found >= 0 else first
    elif rules.call_opening and marks[0].field.startswith("tool_calls"):
        found = text.rfind(rules.call_opening, floor, first + len(rules.call_opening))
        start = found if found >= 0 else first
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
    """Return the first control token behind a message's text; behind a tool call, one that is known
    to end turns.

    Some templates close a call and the list of calls with control tokens before the one that ends
    the turn.
    """
    if _ends_in_tool_call(marks):
        for found in rules.control.finditer(text, start, end):
            if found[0] in rules.closing:
                return found
    return rules.control.search(text, start, end)


def _end_of_run(text: str, end: int, rules: SpanRules) -> int:
    """Return the end of the control tokens that end a turn and follow one another from `end` on."""
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
    """Cover a region: text by its fields, the template's words in it by their neighbour, then the
    terminator."""
    start, end = region
    pieces: list[tuple[int, int, Kind, bool]] = []
    cursor, before = start, Kind.ASSISTANT
    for mark in marks:
        kind = FIELD_KINDS.get(mark.field.split("/", 1)[0], before)
        if mark.start > cursor:
            pieces.append((cursor, mark.start, _kind_between(before, kind), False))
        pieces.append((max(cursor, mark.start), mark.end, kind, True))
        cursor, before = max(cursor, mark.end), kind
    stop = _terminator(text, cursor, end, marks, rules)
    if stop and stop[0] not in rules.closing:
        end, stop = stop.start(), None  # a generation block that goes on into the next message
    if stop:
        pieces.append((cursor, stop.start(), before, False))
        end = _end_of_run(text, stop.end(), rules)
        pieces.append((stop.start(), end, Kind.TERMINATOR, False))
    else:
        pieces.append((cursor, end, Kind.TERMINATOR if before == Kind.ASSISTANT else before, False))
    for first, last, kind, is_text in pieces:
        if first < last:
            for a, b, part_kind in _inline_reasoning(text, first, last, kind, is_text):
                yield Span(a, b, part_kind, message, start, end, is_text)


def _kind_between(before: Kind, after: Kind) -> Kind:
    """The template's own words between two fields belong to the one that is more than plain
    content."""
    return after if after != Kind.ASSISTANT else before


def _inline_reasoning(
    text: str, start: int, end: int, kind: Kind, is_text: bool
) -> Iterator[tuple[int, int, Kind]]:
    if kind == Kind.ASSISTANT and is_text and text.find("<think>", start, end) >= 0:
        for found in _INLINE_REASONING.finditer(text, start, end):
            if start < found.start():
                yield start, found.start(), kind
            yield found.start(), found.end(), Kind.REASONING
            start = found.end()
    if start < end:
        yield start, end, kind


def _without_overlaps(spans: list[Span]) -> list[Span]:
    """Order the spans; where a template prints text of a message inside its text, the span that
    starts later is cut."""
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
