"""The clips that a plan leaves out, and why; millions of them are some numbers until they are asked for."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np

from shared.cache.ledger import Refusal
from shared.clips.samples import SampleMaker
from shared.spec import Bucket
from shared.windows import Integers

_MADE_AT_ONCE = 1 << 14


class Refusals(Sequence[Refusal]):
    """Clips that are not planned, each refusal made when it is asked for.

    Args:
        maker: Knows the clips.
        buckets: That were asked for.
        unfilled: Rows of clips that fill none of them.
        unusable: Rows of clips that cannot be used at all.
    """

    def __init__(self, maker: SampleMaker, buckets: Sequence[Bucket], unfilled: Integers, unusable: Integers) -> None:
        self._maker, self._buckets, self._num_unfilled = maker, buckets, len(unfilled)
        self._rows = np.concatenate([unfilled, unusable])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Refusal: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Refusal]: ...
    def __getitem__(self, place: int | slice) -> Refusal | Sequence[Refusal]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        return next(self._made(number, number + 1))

    def __iter__(self) -> Iterator[Refusal]:
        for first, end in pairwise([*range(0, self._num_unfilled, _MADE_AT_ONCE), self._num_unfilled]):
            yield from self._made(first, end)
        for first, end in pairwise([*range(self._num_unfilled, len(self), _MADE_AT_ONCE), len(self)]):
            yield from self._made(first, end)

    def _made(self, first: int, end: int) -> Iterator[Refusal]:
        """Yields some refusals, all of one of the two kinds."""
        rows = self._rows[first:end]
        sources, versions = self._maker.sources(rows), self._maker.versions(rows)
        if first >= self._num_unfilled:
            for source, version, (reason, detail) in zip(sources, versions, self._maker.faults(rows), strict=True):
                yield Refusal(source=source, source_version=version, reason=reason, detail=detail)
            return
        shortfalls = self._maker.shortfalls(rows, self._buckets)
        for source, version, (bucket, reason, detail) in zip(sources, versions, shortfalls, strict=True):
            yield Refusal(source=source, source_version=version, bucket=str(bucket), reason=reason, detail=detail)

    def reasons(self) -> Counter[str]:
        """Returns how many clips are refused for each reason."""
        unfilled, unusable = self._rows[: self._num_unfilled], self._rows[self._num_unfilled :]
        return self._maker.count_shortfalls(unfilled, self._buckets) + self._maker.count_faults(unusable)
