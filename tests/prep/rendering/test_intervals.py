"""Ranges found by bisection are those that a loop over all of them finds."""

from hypothesis import assume, given
from hypothesis import strategies as st

from prep.rendering.intervals import Intervals, outermost

a_bound = st.integers(0, 30)
some_ranges = st.lists(st.tuples(a_bound, a_bound).map(sorted).map(tuple), max_size=8)


@st.composite
def disjoint_ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    bounds = draw(st.lists(a_bound, max_size=12, unique=True).map(sorted))
    return list(zip(bounds[::2], bounds[1::2], strict=False))


@given(ranges=disjoint_ranges(), first=a_bound, last=a_bound)
def test_ranges_touch_where_they_share_a_character(
    ranges: list[tuple[int, int]], first: int, last: int
) -> None:
    assume(first < last)
    expected = any(max(first, start) < min(last, end) for start, end in ranges)
    assert Intervals(ranges).touch(first, last) == expected


@given(ranges=some_ranges, first=a_bound, last=a_bound)
def test_a_lookup_by_position_is_that_of_a_loop(
    ranges: list[tuple[int, int]], first: int, last: int
) -> None:
    intervals = Intervals(ranges)
    in_order = sorted(ranges)
    starting = [one for one in in_order if first <= one[0] < last]
    assert in_order[intervals.starting_in(first, last)] == starting
    ends = [end for _, end in ranges if end <= first]
    assert intervals.last_end(first, -1) == max(ends, default=-1)
    starts = [start for start, _ in ranges if start >= first]
    assert intervals.first_start(first, 99) == min(starts, default=99)


@given(ranges=some_ranges)
def test_the_outermost_ranges_lie_in_no_other(ranges: list[tuple[int, int]]) -> None:
    def is_inside(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one != other and other[0] <= one[0] and one[1] <= other[1]

    different = sorted(set(ranges))
    expected = [one for one in different if not any(is_inside(one, other) for other in different)]
    assert outermost(ranges) == expected
