"""Columns of strings as numbers of 64 bits, and finding one column's numbers in another's.

Ten million file names are dear to hold as Python's strings, and to look up one by one. Their fingerprints are Python's
own hashes (SipHash with the process's key): that any two of ten million are equal by chance has a probability of three
in a million. They mean nothing in another process.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Numbers = npt.NDArray[np.uint64]
"""(N,), or (N, 2) of identities, which have 128 bits."""

_ROWS_AT_ONCE = 1 << 15
_STEP = np.uint64(0x9E3779B97F4A7C15)


def fingerprints(column: pa.ChunkedArray | pa.Array) -> Numbers:
    """Returns the fingerprints (N,) of strings; null has one too."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [
        np.fromiter(map(hash, part.to_pylist()), np.int64, len(part)).view(np.uint64)
        for chunk in chunks
        for part in _parts(chunk)
    ]
    return np.concatenate([np.empty(0, np.uint64), *parts])


def with_times(numbers: Numbers, *times: pa.ChunkedArray) -> Numbers:
    """Returns other fingerprints (N,) for other times, of columns of seconds (N,); null is a time of its own."""
    for column in times:
        if column.null_count < len(column):
            bits = column.fill_null(0.0).to_numpy().astype(np.float64).view(np.uint64)
            bits = np.where(column.is_null().to_numpy().astype(bool), 0, _mixed(bits + np.uint64(1)))
        else:
            bits = np.zeros(len(column), np.uint64)
        numbers = _mixed(numbers + bits)
    return numbers


def _mixed(values: Numbers) -> Numbers:
    """Returns other numbers (N,) one to one, every bit of which depends on all bits (SplitMix64)."""
    values = values + _STEP
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _parts(chunk: pa.Array) -> Iterator[pa.Array]:
    for start in range(0, len(chunk), _ROWS_AT_ONCE):
        yield chunk.slice(start, _ROWS_AT_ONCE)


class Lookup:
    """Finds numbers in a column of them.

    Args:
        numbers: (N,), or (N, 2). Of equal ones, the last counts.
    """

    def __init__(self, numbers: Numbers) -> None:
        rows = numbers if numbers.ndim == 2 else numbers[:, None]
        order = np.argsort(rows[:, 0])
        first = rows[order, 0]
        if (first[1:] == first[:-1]).any():
            order = np.lexsort((np.arange(len(rows)), rows[:, -1], rows[:, 0]))
            ordered = rows[order]
            is_last = np.append((ordered[1:] != ordered[:-1]).any(axis=1), True)
            order, first = order[is_last], ordered[is_last, 0]
        self._order, self._first = order, first
        self._second = rows[order, 1] if rows.shape[1] > 1 else None

    def __len__(self) -> int:
        return len(self._order)

    def find(self, numbers: Numbers) -> npt.NDArray[np.int64]:
        """Returns for each of the numbers, (M,) or (M, 2), its place in the column, -1 where it is not there."""
        found = np.full(len(numbers), -1, np.int64)
        if not len(self._order) or not len(numbers):
            return found
        rows = numbers if numbers.ndim == 2 else numbers[:, None]
        waiting = np.argsort(rows[:, 0])  # in order, so that what is looked at lies together
        places = np.searchsorted(self._first, rows[waiting, 0])
        while len(waiting):
            is_inside = places < len(self._first)
            waiting, places = waiting[is_inside], places[is_inside]
            is_near = self._first[places] == rows[waiting, 0]
            waiting, places = waiting[is_near], places[is_near]
            if self._second is None:
                found[waiting] = self._order[places]
                break
            is_equal = self._second[places] == rows[waiting, 1]
            found[waiting[is_equal]] = self._order[places[is_equal]]
            waiting, places = waiting[~is_equal], places[~is_equal] + 1
        return found
