"""Kinds and masks against slow references that follow the words of the definition byte by byte."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.config import MaskConfig
from prep.rendering.spans import Rendered, RenderedMessage, Span
from prep.selection.loss_mask import loss_mask_of
from prep.store.samples import TRAIN_NO, TRAIN_UNSET, TRAIN_YES, Samples
from prep.tokenization.align import align
from prep.tokenization.encoder import Encoded
from shared.shard_format import ASSISTANT_KINDS, KIND_MASK, STRADDLES, Kind

RANK = [
    Kind.TEMPLATE, Kind.SYSTEM, Kind.USER, Kind.TOOL,
    Kind.TERMINATOR, Kind.REASONING, Kind.TOOL_CALL, Kind.ASSISTANT,
]  # fmt: skip
CONTENTS = [
    [Kind.USER],
    [Kind.SYSTEM],
    [Kind.ASSISTANT, Kind.TERMINATOR],
    [Kind.REASONING, Kind.ASSISTANT, Kind.TOOL_CALL, Kind.TERMINATOR],
]
POLICIES = [
    MaskConfig(train_on=train_on, boundary=boundary)
    for train_on in ("assistant", "last_assistant", "all")
    for boundary in ("overlap", "inside")
]


@st.composite
def some_row(draw: st.DrawFn) -> tuple[Rendered, list[tuple[int, int]]]:
    """A rendering of messages, each with a header, text and maybe a terminator; tokens that cut it
    anywhere."""
    text, spans, messages = "", [], []
    letters = st.text(alphabet="a\u00e9\u6771\U0001f642", max_size=4)
    for index in range(draw(st.integers(0, 4))):
        messages.append(RenderedMessage(index, len(text)))
        text += draw(letters)  # header
        start = len(text)
        kinds = draw(st.sampled_from(CONTENTS))
        parts = []
        for kind in kinds:
            part = draw(letters)
            parts.append((len(text), len(text) + len(part), kind))
            text += part
        spans += [Span(a, b, kind, index, start, len(text), True) for a, b, kind in parts if a < b]
    text += draw(letters)
    size = len(text.encode())
    cuts = (
        sorted(draw(st.sets(st.integers(1, max(1, size - 1)), max_size=size))) if size > 1 else []
    )
    bounds = [0, *cuts, size] if size else []
    return Rendered(text, spans, messages), list(pairwise(bounds))


def chunk_of(rows: list[tuple[Rendered, list[tuple[int, int]]]]) -> Encoded:
    sizes = np.cumsum([0, *(len(row.text.encode()) for row, _ in rows)])
    ranges = [
        (a + base, b + base)
        for (_, tokens), base in zip(rows, sizes[:-1], strict=True)
        for a, b in tokens
    ]
    both = np.asarray(ranges, np.int64).reshape(-1, 2)
    counts = np.cumsum([0, *(len(tokens) for _, tokens in rows)], dtype=np.int64)
    return Encoded(
        np.zeros(len(both), np.int32), both[:, 0], both[:, 1], counts, sizes.astype(np.int64), 0
    )


def kind_by_bytes(row: Rendered, start: int, end: int) -> int:
    """The kind of a token that covers bytes [start, end): that of the highest rank, and whether it
    reaches outside."""
    kind = 0
    for span in sorted(row.spans, key=lambda span: RANK.index(span.kind)):
        place = {name: len(row.text[: getattr(span, name)].encode()) for name in ("start", "end")}
        region = [len(row.text[:at].encode()) for at in (span.region_start, span.region_end)]
        if set(range(start, end)) & set(range(place["start"], place["end"])):
            kind = span.kind | (STRADDLES if start < region[0] or end > region[1] else 0)
    return int(kind)


@given(st.lists(some_row(), max_size=3))
@settings(deadline=None, max_examples=300)
def test_kinds_are_those_of_the_bytes_that_a_token_covers(
    rows: list[tuple[Rendered, list[tuple[int, int]]]],
) -> None:
    aligned = align(chunk_of(rows), [row for row, _ in rows])
    assert aligned.kind.tolist() == [
        kind_by_bytes(row, a, b) for row, tokens in rows for a, b in tokens
    ]


@given(st.lists(some_row(), max_size=3))
@settings(deadline=None, max_examples=300)
def test_a_message_begins_behind_the_one_before_it(
    rows: list[tuple[Rendered, list[tuple[int, int]]]],
) -> None:
    aligned = align(chunk_of(rows), [row for row, _ in rows])
    assert (
        aligned.row_messages.tolist()
        == np.cumsum([0, *(len(row.messages) for row, _ in rows)]).tolist()
    )
    offsets, first_token = aligned.message_offsets.tolist(), 0
    for index, (row, tokens) in enumerate(rows):
        mine = offsets[aligned.row_messages[index] : aligned.row_messages[index + 1]]
        for message, offset in zip(row.messages, mine, strict=True):
            bound = len(row.text[: message.start].encode())
            before = [i for i, (_, end) in enumerate(tokens) if end <= bound]
            behind = [i for i, (start, _) in enumerate(tokens) if start >= bound]
            assert len(before) <= offset - first_token <= (behind[0] if behind else len(tokens))
        assert mine == sorted(mine)
        first_token += len(tokens)


def test_a_token_shared_by_header_and_answer_belongs_to_the_answer_and_straddles() -> None:
    row = Rendered(
        "<a>\nHi<e>\n",
        [Span(4, 6, Kind.ASSISTANT, 0, 4, 9, True), Span(6, 9, Kind.TERMINATOR, 0, 4, 9, False)],
        [RenderedMessage(0, 0)],
    )
    aligned = align(chunk_of([(row, [(0, 2), (2, 5), (5, 6), (6, 9), (9, 10)])]), [row])
    assert aligned.kind.tolist() == [
        0,
        Kind.ASSISTANT | STRADDLES,
        Kind.ASSISTANT,
        Kind.TERMINATOR,
        0,
    ]


@pytest.mark.parametrize("train", [(TRAIN_YES, TRAIN_NO), (TRAIN_NO, TRAIN_YES)])
def test_a_token_shared_by_two_messages_goes_with_the_one_that_names_it(
    train: tuple[int, int],
) -> None:
    spans = [Span(0, 3, Kind.USER, 0, 0, 3, True), Span(3, 6, Kind.ASSISTANT, 1, 3, 6, True)]
    row = Rendered("aaabbb", spans, [RenderedMessage(0, 0), RenderedMessage(1, 3)])
    encoded = chunk_of([(row, [(0, 2), (2, 4), (4, 6)])])
    aligned = align(encoded, [row])
    assert aligned.message_offsets.tolist() == [0, 1]
    samples = Samples(
        aligned.kind, encoded.row_offsets, aligned.row_messages, aligned.message_offsets,
        np.array([Kind.USER, Kind.ASSISTANT], np.uint8), np.array(train, np.uint8),
    )  # fmt: skip
    assert loss_mask_of(samples, MaskConfig()).tolist() == (
        [0, 0, 0] if train[1] == TRAIN_NO else [0, 1, 1]
    )


# Masks


@st.composite
def some_samples(draw: st.DrawFn) -> Samples:
    kinds, offsets, counts, starts, roles, flags = [], [0], [0], [], [], []
    for _ in range(draw(st.integers(0, 4))):
        length = draw(st.integers(0, 8))
        messages = draw(st.integers(0, 4))
        starts += sorted(
            draw(st.lists(st.integers(0, length), min_size=messages, max_size=messages))
        )[:]
        starts[len(starts) - messages :] = [
            start + offsets[-1] for start in starts[len(starts) - messages :]
        ]
        roles += draw(st.lists(st.sampled_from([1, 2, 3, 6]), min_size=messages, max_size=messages))
        flags += draw(st.lists(st.integers(0, 2), min_size=messages, max_size=messages))
        kinds += draw(st.lists(st.sampled_from([k | s for k in range(8) for s in (0, 128)]),
                               min_size=length, max_size=length))  # fmt: skip
        offsets.append(offsets[-1] + length)
        counts.append(counts[-1] + messages)
    as_bytes = [np.asarray(values, np.uint8) for values in (kinds, roles, flags)]
    as_ints = [np.asarray(values, np.int64) for values in (offsets, counts, starts)]
    return Samples(as_bytes[0], *as_ints, *as_bytes[1:])


def mask_token_by_token(samples: Samples, policy: MaskConfig) -> list[int]:
    mask = []
    for sample in range(len(samples.sample_offsets) - 1):
        first, end = samples.sample_offsets[sample : sample + 2].tolist()
        messages = range(*samples.sample_messages[sample : sample + 2].tolist())
        assistants = [m for m in messages if samples.message_role[m] == Kind.ASSISTANT]
        for token in range(first, end):
            message = max(
                (m for m in messages if samples.message_offsets[m] <= token), default=None
            )
            kind = int(samples.kind[token])
            trained = policy.train_on == "all" or (
                (kind & KIND_MASK) in ASSISTANT_KINDS
                and not (policy.boundary == "inside" and kind & STRADDLES)
            )
            trained &= message is None or samples.message_train[message] != TRAIN_NO
            if policy.train_on == "last_assistant" and message is not None:
                trained &= bool(assistants) and message == assistants[-1]
            mask.append(int(trained and token != first))
    return mask


@pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda policy: f"{policy.train_on}-{policy.boundary}"
)
@given(samples=some_samples())
@settings(deadline=None, max_examples=150)
def test_the_mask_is_that_of_the_rules_token_by_token(policy: MaskConfig, samples: Samples) -> None:
    assert loss_mask_of(samples, policy).tolist() == mask_token_by_token(samples, policy)


@pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda policy: f"{policy.train_on}-{policy.boundary}"
)
@given(samples=some_samples())
@settings(deadline=None, max_examples=30)
def test_the_first_token_of_a_sample_is_never_trained(policy: MaskConfig, samples: Samples) -> None:
    mask = loss_mask_of(samples, policy)
    starts = samples.sample_offsets[:-1][np.diff(samples.sample_offsets) > 0]
    assert not mask[starts].any()
    assert TRAIN_UNSET not in mask
