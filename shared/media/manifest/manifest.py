"""A manifest that was read: an Arrow table in mapped memory, and clips made of its rows when asked for."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa

from shared.errors import InputError
from shared.media.clip import Clip, Media, TimeRange
from shared.wording import counted

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusedRow:
    """A row that names no clip or says nothing of it."""

    source: str
    reason: str
    detail: str


class TableRows(Sequence[Item]):
    """A table's rows as objects, each made when it is asked for.

    Args:
        table: The table.
        make: Makes an object of a row, which it gets as a dict.
    """

    def __init__(self, table: pa.Table, make: Callable[[dict[str, Any]], Item]) -> None:
        self._table, self._make = table, make
        self._batches = table.to_batches()
        self._ends = np.cumsum([len(batch) for batch in self._batches])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self)
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[number]
        place = row - int(self._ends[number]) + len(batch)
        return self._make({name: batch.column(name)[place].as_py() for name in batch.schema.names})

    def __iter__(self) -> Iterator[Item]:
        for batch in self._table.to_batches(max_chunksize=4096):
            yield from map(self._make, batch.to_pylist())

    def __repr__(self) -> str:
        return f"<{len(self)} rows>"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Manifest:
    """What a manifest holds, in its order."""

    root: str
    """The local folder or the URL from which its sources are relative."""
    num_rows: int
    table: pa.Table
    """One row a clip: source, url (string), offset, size (int64: of members of tars), start, end (float64, seconds:
    of parts of clips; null: to the beginning, to the end), captions (list<string>), and columns (struct) where the
    manifest says more. (source, start, end) is unique."""
    refused: Sequence[RefusedRow]

    @property
    def clips(self) -> Sequence[Clip]:
        """The table's rows."""
        return TableRows(self.table, clip_of_row)

    def require_usable(self, shown: str) -> None:
        """Checks that there is a row that can be used: a list that was cut off must not pass for one of nothing.

        Args:
            shown: What to call the manifest.

        Raises:
            InputError: if there is none; if each was refused, counted by reason, with a row of the most common one.
        """
        if self.table.num_rows:
            return
        if not self.refused:
            raise InputError(f"manifest {shown}: it names no clip: expected at least one row")
        reasons = Counter(row.reason for row in self.refused).most_common()
        counts = ", ".join(f"{number:,} {reason}" for reason, number in reasons)
        example = next(row for row in self.refused if row.reason == reasons[0][0])
        raise InputError(
            f"manifest {shown}: none of its {counted(self.num_rows, 'row')} can be used: {counts}, e.g. "
            f"{example.source}: {example.detail}: expected the path of a clip and a text in each, in a folder a .txt "
            "beside each clip"
        )


def clip_of_row(row: dict[str, Any]) -> Clip:
    """Returns the clip of a row of a manifest's table."""
    is_whole = row["start"] is None and row["end"] is None
    return Clip(
        source=row["source"],
        media=Media(url=row["url"], offset=row["offset"], size=row["size"]),
        captions=tuple(row["captions"]),
        time_range=None if is_whole else TimeRange(start=row["start"] or 0.0, end=row["end"]),
        columns=row.get("columns") or {},
    )


def refused_row(row: dict[str, Any]) -> RefusedRow:
    """Returns the refusal of a row of a table of refusals."""
    return RefusedRow(source=row["source"], reason=row["reason"], detail=row["detail"])
