"""Stretches of a text, found by their place: a long conversation has thousands of them, so no loop
may ask them all."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable


class Intervals:
    """Character ranges [start, end), ordered by start."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        ordered = sorted(ranges)
        self._starts = [start for start, _ in ordered]
        self._ends = sorted(
            end for _, end in ordered
        )  # in step with the starts only where the ranges are disjoint

    def touch(self, first: int, last: int) -> bool:
        """Say whether the characters [first, last) share one with a range; the ranges must be
        disjoint."""
        return bisect_right(self._ends, first) < bisect_left(self._starts, last)

    def starting_in(self, first: int, last: int) -> slice:
        """Return the indices, by order of start, of the ranges that start in [first, last)."""
        return slice(bisect_left(self._starts, first), bisect_left(self._starts, last))

    def last_end(self, limit: int, default: int) -> int:
        """Return the last end that is not behind `limit`."""
        index = bisect_right(self._ends, limit)
        return self._ends[index - 1] if index else default

    def first_start(self, floor: int, default: int) -> int:
        """Return the first start that is not before `floor`."""
        index = bisect_left(self._starts, floor)
        return self._starts[index] if index < len(self._starts) else default


def outermost(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges in order without those that lie within another."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(ranges, key=lambda one: (one[0], -one[1])):
        if not result or end > result[-1][1]:
            result.append((start, end))
    return result
