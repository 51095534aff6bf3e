"""A message ends where the next one of its sample begins, or with the sample."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prep.store.samples import Samples, message_ends


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=4).map(lambda m: (m, sum(m))), max_size=6),
    st.integers(0, 3),
)
def test_messages_end_where_their_neighbours_begin(
    samples: list[tuple[list[int], int]], behind: int
) -> None:
    """A sample is the lengths of its messages, and `behind` tokens more in the last of them."""
    starts, ends, sample_offsets, sample_messages = [], [], [0], [0]
    for lengths, total in samples:
        begin = sample_offsets[-1]
        bounds = begin + np.cumsum([0, *lengths])
        sample_offsets.append(begin + total + behind)
        sample_messages.append(sample_messages[-1] + len(lengths))
        starts += bounds[:-1].tolist()
        ends += [*bounds[1:-1].tolist(), sample_offsets[-1]] if lengths else []
    none = np.zeros(0, np.uint8)
    columns = Samples(
        kind=none,
        sample_offsets=np.asarray(sample_offsets),
        sample_messages=np.asarray(sample_messages),
        message_offsets=np.asarray(starts, np.int64),
        message_role=none,
        message_train=none,
    )
    assert message_ends(columns).tolist() == ends
