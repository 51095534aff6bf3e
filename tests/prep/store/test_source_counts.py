"""The counts of a source do not depend on how its rows are cut into chunks."""

import json
from dataclasses import asdict, replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from raw_chunks import builder, chunk_of

from prep.conversations.formats import Conversion
from prep.store.source_counts import SourceCounts

CALL = {"name": "f", "arguments": "not json"}
ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
    {"messages": [{"role": "user", "content": "Hi <|im_end|>"}], "kind": "typed"},
    {"messages": [{"role": "user", "content": "x", "train": False}], "kind": "untrained"},
    {"messages": [{"role": "user", "content": "x"}, {"role": "environment", "content": "1"}]},
    {"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL]}], "kind": "call"},
    {"messages": "none", "kind": "typed"},
    {"kind": "no messages"},
]


@given(rows=st.lists(st.sampled_from(ROWS), min_size=1, max_size=12), data=st.data())
@settings(deadline=None, max_examples=30)
def test_chunks_of_any_size_add_up_to_the_same_counts(
    rows: list[dict[str, object]], data: st.DataObject
) -> None:
    # rows of one text are equal, so a number tells them apart, as real rows are
    lines = [json.dumps({"id": number, **row}).encode() for number, row in enumerate(rows)]
    conversion = Conversion("messages", split_by="kind")
    chunks = builder("qwen3", drop_messages=data.draw(st.booleans()))

    def facts_of(first: int, last: int) -> dict[str, object]:
        chunk = replace(chunk_of(lines[first:last]), first_row=first, conversion=conversion)
        return json.loads(json.dumps(chunks.build(chunk).facts))

    whole, pieces = SourceCounts(), SourceCounts()
    whole.add(facts_of(0, len(rows)))
    inner = data.draw(st.sets(st.integers(1, len(rows)), max_size=3))
    bounds = sorted({0, len(rows), *inner})
    for first, last in pairwise(bounds):
        pieces.add(facts_of(first, last))

    def comparable(counts: SourceCounts) -> dict[str, object]:
        # the line number in a message is that of the chunk
        plain = asdict(counts)
        plain["rejects"] = [(row, reason) for row, reason, _ in counts.rejects]
        return plain

    assert comparable(pieces) == comparable(whole)
    assert whole.rows == len(rows)
