"""Where the texts lie that samples share, as columns: some 70 bytes a text, so that ten million fit in a driver."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache.identity import identity_numbers, identity_texts
from shared.cache.schema import CAPTION, SHARED
from shared.fingerprints import Lookup, Numbers

PLACE_COLUMNS = [*(f"{SHARED}.{field.name}" for field in CAPTION if field.name != "caption"), "channels"]
"""Of a fragment of shared texts: all but the captions themselves."""
_REPEATED = ("shard", "codec")


class SharedTexts(Mapping[str, dict[str, Any]]):
    """The places of texts of one stream, with ``channels``, by the texts' identities.

    Args:
        tables: Of fragments, with :data:`PLACE_COLUMNS`; of several places of one text, the first counts.
        folder: In which the stream's shards lie.
    """

    def __init__(self, tables: Iterable[pa.Table], folder: str) -> None:
        parts, ids = [], [np.empty((0, 2), np.uint64)]
        for table in tables:
            columns = table.flatten()
            columns = columns.rename_columns([name.removeprefix(f"{SHARED}.") for name in columns.column_names])
            columns = columns.filter(pc.starts_with(columns["shard"], folder))
            ids.append(identity_numbers(columns["id"].to_pylist()))
            columns = columns.drop_columns(["id"])
            for name in _REPEATED:
                place = columns.column_names.index(name)
                columns = columns.set_column(place, name, columns[name].dictionary_encode())
            parts.append(columns)
        self._table = pa.concat_tables(parts).unify_dictionaries().combine_chunks() if parts else None
        self._numbers = np.concatenate(ids)
        backwards = np.arange(len(self._numbers))[::-1]
        self._rows = backwards  # of equal numbers a lookup takes the last
        self._lookup = Lookup(self._numbers[backwards])

    def find(self, numbers: Numbers) -> npt.NDArray[np.int64]:
        """Returns for identities (M, 2) the rows of their places, -1 where a text is not stored."""
        found = self._lookup.find(numbers)
        return np.where(found < 0, -1, self._rows[found]) if len(self._rows) else found

    def places(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Returns the places of some texts.

        Raises:
            KeyError: if one is not stored.
        """
        names = list(ids)
        rows = self.find(identity_numbers(names))
        if (rows < 0).any():
            raise KeyError(names[int(np.argmin(rows))])
        if self._table is None:
            return {}
        found = self._table.take(pa.array(rows)).to_pylist()
        return {name: {"id": name, **place} for name, place in zip(names, found, strict=True)}

    def __getitem__(self, identity: str) -> dict[str, Any]:
        return self.places([identity])[identity]

    def __contains__(self, identity: object) -> bool:
        return isinstance(identity, str) and bool(self.find(identity_numbers([identity]))[0] >= 0)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(identity_texts(self._numbers)))

    def __len__(self) -> int:
        return len(self._lookup)

    def __repr__(self) -> str:
        return f"<places of {len(self)} texts>"
