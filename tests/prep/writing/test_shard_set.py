"""Packing keeps every sequence of every source once and fills no pack beyond its capacity."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.selection.sequences import SEQUENCE
from prep.writing.shard_set import pack_sequences

MAX_SEQ_LEN = 10


def source_of_lengths(lengths: list[int]) -> SimpleNamespace:
    sequences = np.zeros(len(lengths), SEQUENCE)
    sequences["row"] = np.arange(len(lengths))
    sequences["length"] = lengths
    sequences["tie_break"] = np.arange(len(lengths))
    return SimpleNamespace(selection=SimpleNamespace(sequences=sequences))


@given(st.lists(st.lists(st.integers(1, MAX_SEQ_LEN), max_size=12), min_size=1, max_size=4))
@settings(deadline=None, max_examples=80)
def test_packs_hold_every_sequence_once_with_its_source(sources: list[list[int]]) -> None:
    packed = pack_sequences([source_of_lengths(lengths) for lengths in sources], MAX_SEQ_LEN)
    assert sorted(zip(packed.source_of, packed.sequences["row"], strict=True)) == [
        (source, row) for source, lengths in enumerate(sources) for row in range(len(lengths))
    ]
    for source, sequence in zip(packed.source_of, packed.sequences, strict=True):
        assert sequence["length"] == sources[source][sequence["row"]]
    for first, last in pairwise(packed.pack_offsets.tolist()):
        assert 0 < packed.sequences["length"][first:last].sum() <= MAX_SEQ_LEN
    assert packed.pack_offsets[-1] == len(packed.sequences)
