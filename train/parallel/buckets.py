"""Flat gradients cut into buckets: what is gathered, and sent, at once. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from train.config import OptimiserOptions, ParallelOptions

BUCKET_ELEMENTS = 2**25
"""Values of a bucket, at most: large enough for the links' speed, small against what is kept for the backward pass."""
SHARED_BELOW = 2**23
"""Values of a rank's part below which buckets hold the parts of several ranks and are summed on all. That sends twice
as much, but a sum on one rank takes a time that grows with the number of ranks, and there are as many of them.
"""
STAGING_BUFFERS = 2
"""Of a bucket each: one is filled while another is sent."""


def uses_buckets(parallel: ParallelOptions, optimiser: OptimiserOptions) -> bool:
    """Whether a run's gradients are gathered in buckets (:mod:`train.parallel.lean_zero`), not by DeepSpeed."""
    return parallel.zero_stage in (1, 2) and parallel.offload == "none" and optimiser.gradient_accumulation == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A range of a parameter, flattened."""

    parameter: int
    """Its number."""
    start: int
    numel: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """A range of all parameters end to end."""

    start: int
    """Of the range."""
    slices: tuple[Slice, ...]
    """In order."""
    owner: int | None
    """The rank that has all of it; None where several ranks have some of it."""

    @property
    def numel(self) -> int:
        """Values of all slices."""
        return sum(each.numel for each in self.slices)

    def held(self, rank: int, part: int) -> slice:
        """Returns which values of the bucket a rank has; of none, an empty slice.

        Args:
            rank: The rank.
            part: Values that each rank has, see :func:`cut_into_buckets`.
        """
        begin, end = (min(max(bound * part - self.start, 0), self.numel) for bound in (rank, rank + 1))
        return slice(begin, end)


def largest_bucket(total: int, part: int) -> int:
    """Returns the values of the largest bucket.

    Args:
        total: Values of all parameters.
        part: Values that each rank has.
    """
    return min(total if part < SHARED_BELOW else part, BUCKET_ELEMENTS)


def cut_into_buckets(
    sizes: Sequence[int], *, part: int, largest: int, shared_below: int = SHARED_BELOW
) -> list[Bucket]:
    """Returns the buckets of parameters that lie end to end, in order; together they hold every value once.

    Args:
        sizes: Values of each parameter.
        part: Values that each rank has, the first rank the first; the last one's may reach beyond the parameters.
        largest: Values of a bucket, at most.
        shared_below: Of smaller parts a bucket holds several.
    """
    ends = list(accumulate(sizes))
    total = ends[-1] if ends else 0
    buckets: list[Bucket] = []
    number = start = 0
    while start < total:
        first, owner = start, start // part
        end = min(start + largest, total)
        if part >= shared_below:
            end = min(end, (owner + 1) * part)
        slices = []
        while start < end:
            if ends[number] > start:
                begin, until = ends[number] - sizes[number], min(end, ends[number])
                slices.append(Slice(parameter=number, start=start - begin, numel=until - start))
                start = until
            if ends[number] <= start:
                number += 1
        one = (end - 1) // part == owner
        buckets.append(Bucket(start=first, slices=tuple(slices), owner=owner if one else None))
    return buckets
