"""Flat gradients cut into buckets, each of one rank: what is gathered, and sent, at once. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from train.config import OptimiserOptions, ParallelOptions

BUCKET_ELEMENTS = 2**25
"""Values of a bucket, at most: large enough for the links' speed, small against what is kept for the backward pass."""
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
    """A range of all parameters end to end that one rank owns."""

    owner: int
    """The rank."""
    offset: int
    """In what the owner has."""
    slices: tuple[Slice, ...]
    """In order."""

    @property
    def numel(self) -> int:
        """Values of all slices."""
        return sum(each.numel for each in self.slices)


def cut_into_buckets(sizes: Sequence[int], *, part: int, largest: int) -> list[Bucket]:
    """Returns the buckets of parameters that lie end to end, in order; together they hold every value once.

    Args:
        sizes: Values of each parameter.
        part: Values that each rank has, the first rank the first; the last one's may reach beyond the parameters.
        largest: Values of a bucket, at most.
    """
    ends = list(accumulate(sizes))
    total = ends[-1] if ends else 0
    buckets: list[Bucket] = []
    number = start = 0
    while start < total:
        owner = start // part
        end = min(start + largest, (owner + 1) * part, total)
        offset, slices = start - owner * part, []
        while start < end:
            if ends[number] > start:
                begin, until = ends[number] - sizes[number], min(end, ends[number])
                slices.append(Slice(parameter=number, start=start - begin, numel=until - start))
                start = until
            if ends[number] <= start:
                number += 1
        buckets.append(Bucket(owner=owner, offset=offset, slices=tuple(slices)))
    return buckets
