"""The hash of draws gives the numbers of splitmix64, and no two values the same one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.splitmix import finalize, splitmix64

MASK = 2**64 - 1


def reference(state: int) -> int:
    """One output of splitmix64 in plain integers (Steele, Lea and Flood 2014, figure 17)."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@given(st.lists(st.integers(0, MASK), max_size=50))
def test_it_is_splitmix64(values: list[int]) -> None:
    array = np.array(values, np.uint64)
    assert splitmix64(array).tolist() == [reference(value) for value in values]
    shifted = array + np.uint64(0x9E3779B97F4A7C15)
    assert finalize(shifted).tolist() == splitmix64(array).tolist()


def test_the_first_output_of_the_published_generator() -> None:
    assert splitmix64(np.zeros(1, np.uint64)).tolist() == [0xE220A8397B1DCDAF]
