"""Which requests to make for ranges of one object. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a range is found in what was read."""

    span: int
    """Which span."""
    offset: int
    """From the span's start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedRanges:
    """Ranges and the fewer, longer spans that hold them."""

    spans: tuple[tuple[int, int], ...]
    """(start, end), rising; no two of them touch."""
    places: tuple[Place | None, ...]
    """For each range as it was given; None for an empty one."""


def merge_ranges(ranges: Sequence[tuple[int, int]], gap_bytes: int) -> MergedRanges:
    """Returns the spans to read for (offset, length) ranges in any order.

    Args:
        gap_bytes: Ranges with no more than so many bytes between them go into one span.
    """
    spans: list[tuple[int, int]] = []
    places: list[Place | None] = [None] * len(ranges)
    for number in sorted(range(len(ranges)), key=lambda number: ranges[number]):
        offset, length = ranges[number]
        assert offset >= 0, (offset, length)
        assert length >= 0, (offset, length)
        if length == 0:
            continue
        if spans and offset <= spans[-1][1] + gap_bytes:
            start, end = spans[-1]
            spans[-1] = start, max(end, offset + length)
        else:
            spans.append((offset, offset + length))
        places[number] = Place(span=len(spans) - 1, offset=offset - spans[-1][0])
    return MergedRanges(spans=tuple(spans), places=tuple(places))
