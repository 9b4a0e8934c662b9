"""The Parquet parts that hold probes: reading, adding, merging.

A part is named by the highest sequence number in it and its content. When there are many small parts they are merged:
the new part is durable before the old ones go, so a kill at any point, or another job that merges too, costs nothing. A
lost part costs probing its clips again.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.errors import InputError
from shared.fingerprints import Lookup, Numbers, fingerprints, with_times
from shared.stores.store import Entry, Store

Result = TypeVar("Result")

_MOST_SMALL_PARTS = 32
_SMALL_BYTES = 64_000_000
_READERS = 8
_ATTEMPTS = 5

SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("version", pa.string()),
        ("num_frames", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("fps_num", pa.int64()),
        ("fps_den", pa.int64()),
        ("duration", pa.float64()),
        ("rotation", pa.int32()),
        ("is_image", pa.bool_()),
        ("codec", pa.string()),
        ("url", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("stamp", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("sequence", pa.int64()),
    ]
)
"""One row a clip and place: a source and, if the clip is a part of it, the time range; where its media lay, ``url``
(null in rows of before there was that column), and of a member of a tar ``offset`` and ``size``. ``reason`` and
``detail`` are null for clips that can be used."""


def clip_keys(table: pa.Table) -> Numbers:
    """Returns numbers (N,) that tell clips from each other, of a table with ``source``, ``start`` and ``end``.

    A clip without a start that has an end starts at 0.
    """
    start, end = table["start"], table["end"]
    if end.null_count < len(end):
        start = pc.if_else(pc.and_(pc.is_null(start), pc.is_valid(end)), 0.0, start)
    return with_times(fingerprints(table["source"]), start, end)


def place_keys(table: pa.Table) -> Numbers:
    """Returns numbers (N,) that tell clips from each other and from those of their names that lie elsewhere, of a table
    with ``url``, ``offset`` and ``size`` too.
    """
    offset, size = (table[name].cast(pa.float64(), safe=False) for name in ("offset", "size"))
    return with_times(clip_keys(table) ^ fingerprints(table["url"]), offset, size)


def schema_of(columns: Sequence[str]) -> pa.Schema:
    """Returns the schema of some columns."""
    return pa.schema([SCHEMA.field(name) for name in columns])


class ProbeParts:
    """The parts in a store.

    Args:
        store: They lie at its root.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def next_sequence(self) -> int:
        """Returns a sequence number above that of every row."""
        return 1 + max((_sequence(entry) for entry in self._entries()), default=0)

    def read(self, columns: Sequence[str], load: Callable[[pa.Table], Result]) -> list[Result]:
        """Returns what is loaded of each part, by their sequence numbers.

        Args:
            columns: Of the parts.
            load: Makes what is wanted of one part's rows.

        Raises:
            InputError: if a part cannot be read.
        """
        for _ in range(_ATTEMPTS):
            parts = self._entries()
            try:
                with ThreadPoolExecutor(_READERS) as pool:
                    return list(pool.map(lambda entry: load(self._read_part(entry.path, columns)), parts))
            except FileNotFoundError:  # merged meanwhile: what was in it lies in a part that is listed now
                continue
        raise InputError(f"{self._store.url}: parts go while they are read: expected no more than a few jobs at once")

    def _read_part(self, path: str, columns: Sequence[str]) -> pa.Table:
        local = self._store.local_path(path)
        try:
            source = pa.BufferReader(self._store.read(path)) if local is None else pa.memory_map(str(local))
            with source, pq.ParquetFile(source) as part:
                table = part.read(columns=list(columns))
                if "url" in columns and "url" not in table.column_names:  # written before it was kept
                    table = table.append_column("url", pa.nulls(len(table), pa.string()))
                return table.select(list(columns)).cast(schema_of(columns))
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise InputError(
                f"{self._store.url}/{path}: not readable ({error}): delete it, and its clips are probed again"
            ) from None

    def write(self, table: pa.Table) -> str:
        """Writes rows as a part, durably, and returns its path."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
        sequence = pc.max(table["sequence"]).as_py()
        path = f"{sequence:012d}-{hashlib.sha256(content).hexdigest()[:32]}.parquet"
        self._store.write(path, content)
        return path

    def merge(self) -> None:
        """Makes one part of many small ones."""
        small = [entry for entry in self._entries() if entry.num_bytes < _SMALL_BYTES]
        if len(small) <= _MOST_SMALL_PARTS:
            return
        try:
            table = pa.concat_tables([self._read_part(entry.path, SCHEMA.names) for entry in small])
        except FileNotFoundError:  # another job merges them
            return
        order = np.argsort(table["sequence"].to_numpy(), kind="stable")
        keys = place_keys(table)[order]
        is_newest = Lookup(keys).find(keys) == np.arange(len(keys))
        merged = self.write(table.take(pa.array(order[is_newest])))
        for entry in small:
            if entry.path != merged:
                self._store.delete(entry.path)

    def _entries(self) -> list[Entry]:
        return sorted(
            (entry for entry in self._store.list() if entry.path.endswith(".parquet") and "/" not in entry.path),
            key=lambda entry: (_sequence(entry), entry.path),
        )


def _sequence(entry: Entry) -> int:
    number = entry.path.partition("-")[0]
    return int(number) if number.isdigit() else 0
