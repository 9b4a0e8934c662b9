"""Which rows of the index are live, and reading those, a part at a time: for what goes over a whole cache.

Of all rows only identities and generations are held in memory, as numbers; whole rows are read by row groups.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.cache.fragments import Record, read_row_group, scan_fragment
from shared.cache.resolve import resolve
from shared.cache.schema import REMOVED, SAMPLE, concat_rows
from shared.stores.store import Store

Rows = npt.NDArray[np.int64]

_READERS = 16
_GROUPS_KEPT = 48
"""Row groups of the index that are held, so that overlays in the order of what they lie over are read once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveRows:
    """The live samples N of an index whose files have M rows of samples, one file behind another.

    A sample's *position* is its place among the live samples, which stand in the order of the rows with their latents.
    """

    paths: tuple[str, ...]
    """Files with rows of samples."""
    num_rows: tuple[int, ...]
    """Of each of them."""
    groups: tuple[tuple[int, int], ...]
    """The row groups of all files: the file, by its place among ``paths``, and which of the file's it is."""
    group_ends: Rows
    """For each of the row groups the number of all rows up to its end."""
    latent: Rows
    """(N,): the number of the row that brings the latent."""
    texts: dict[str, Rows]
    """By stream (N,): the number of the row that brings the texts, -1 where there are none."""
    removed: pa.Table
    """The samples that were removed once: ``sample`` and ``removed``, the highest generation."""
    schema: pa.Schema
    """Of the rows of samples of all files."""
    shared: tuple[str, ...]
    """Files with texts that samples share."""
    records: dict[str, Record]
    """By path, of all files."""

    def __len__(self) -> int:
        return len(self.latent)


def find_live(cache: Cache, paths: Sequence[str]) -> LiveRows:
    """Returns the live rows of a cache.

    Args:
        cache: Opened.
        paths: The files of its index that count, see ``IndexFiles.paths``.

    Raises:
        InputError: if one cannot be read.
    """
    text_streams = [stream for stream in cache.provenance if layout.is_text(stream)]
    wanted = ["sample", REMOVED.name, *(f"{name}.generation" for name in (layout.LATENT_STREAM, *text_streams))]
    with ThreadPoolExecutor(_READERS) as pool:
        scanned = list(pool.map(lambda path: scan_fragment(cache.store, path, wanted), paths))
    named = list(zip(paths, scanned, strict=True))
    of_samples = [(path, fragment) for path, fragment in named if not fragment.is_shared]
    kept = {"sample", REMOVED.name, layout.LATENT_STREAM, *text_streams}
    tables = [_selected(fragment.table, kept) for _, fragment in of_samples]
    starts = np.cumsum([0, *(table.num_rows for table in tables)])
    groups = [
        (file, group) for file, (_, fragment) in enumerate(of_samples) for group in range(len(fragment.group_ends))
    ]
    table = pa.concat_tables([SAMPLE.empty_table(), *tables], promote_options="permissive")
    table = _with_row_numbers(table, (layout.LATENT_STREAM, *text_streams))
    live = resolve(table)
    schemas = {fragment.schema.remove_metadata() for _, fragment in of_samples}
    return LiveRows(
        paths=tuple(path for path, _ in of_samples),
        num_rows=tuple(table.num_rows for table in tables),
        groups=tuple(groups),
        group_ends=np.array(
            [start + end for start, (_, part) in zip(starts, of_samples, strict=False) for end in part.group_ends],
            np.int64,
        ),
        latent=_row_numbers(live, layout.LATENT_STREAM),
        texts={stream: _row_numbers(live, stream) for stream in text_streams},
        removed=_removed(table),
        schema=concat_rows([schema.empty_table() for schema in [SAMPLE, *schemas]]).schema,
        shared=tuple(path for path, fragment in named if fragment.is_shared),
        records={path: fragment.record for path, fragment in named},
    )


def _selected(table: pa.Table, names: set[str]) -> pa.Table:
    return table.select([name for name in table.column_names if name in names]).replace_schema_metadata(None)


def _with_row_numbers(table: pa.Table, streams: Sequence[str]) -> pa.Table:
    """Returns the table with the number of each row beside the generation of each of its streams."""
    for stream in streams:
        if stream not in table.column_names:
            continue
        chunks, start = [], 0
        for chunk in table[stream].chunks:
            rows = pa.array(np.arange(start, start + len(chunk)))
            start += len(chunk)
            generations = pc.struct_field(chunk, "generation")
            chunks.append(
                pa.StructArray.from_arrays([generations, rows], ["generation", "row"], mask=pc.is_null(chunk))
            )
        kind = pa.struct([("generation", pa.int32()), ("row", pa.int64())])
        table = table.set_column(table.column_names.index(stream), stream, pa.chunked_array(chunks, kind))
    return table


def _row_numbers(live: pa.Table, stream: str) -> Rows:
    if stream not in live.column_names:
        return np.full(live.num_rows, -1, np.int64)
    rows = pa.chunked_array([pc.struct_field(chunk, "row") for chunk in live[stream].chunks], pa.int64())
    return pc.fill_null(rows, -1).to_numpy().astype(np.int64)


def _removed(table: pa.Table) -> pa.Table:
    schema = pa.schema([*SAMPLE, REMOVED])
    if REMOVED.name not in table.column_names:
        return schema.empty_table()
    rows = table.select(["sample", REMOVED.name]).filter(pc.is_valid(table[REMOVED.name]))
    grouped = rows.group_by("sample", use_threads=False).aggregate([(REMOVED.name, "max")])
    return grouped.rename_columns({f"{REMOVED.name}_max": REMOVED.name}).select(schema.names).cast(schema)


class RowReader:
    """Reads whole rows of live samples.

    Args:
        store: The cache's.
        live: Its live rows.
        columns: Parquet paths; all by default.
    """

    def __init__(self, store: Store, live: LiveRows, columns: Sequence[str] | None = None) -> None:
        self._store, self._live = store, live
        self._columns = None if columns is None else list(columns)
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def read(self, positions: Rows) -> pa.Table:
        """Returns live samples (n,) as rows, each stream as it was encoded last, in the order of ``positions``."""
        live = self._live
        base = live.latent[positions]
        table = self._take(base)
        table = table.select([name for name in table.column_names if name != REMOVED.name])
        for stream, rows in live.texts.items():
            chosen = rows[positions]
            elsewhere = (chosen != base) & (chosen >= 0)
            if not elsewhere.any():
                if stream in table.column_names and (chosen < 0).any():
                    taken = table[stream].take(pa.array(np.arange(len(base)), mask=chosen < 0))
                    table = table.set_column(table.column_names.index(stream), stream, taken)
                continue
            overlays = self._take(chosen[elsewhere])[stream]
            if stream not in table.column_names:
                table = table.append_column(stream, pa.nulls(len(base), overlays.type))
            index = np.arange(len(base))
            index[elsewhere] = len(base) + np.arange(int(elsewhere.sum()))
            both = pa.chunked_array([*table[stream].chunks, *overlays.chunks], overlays.type)
            taken = both.take(pa.array(index, mask=chosen < 0))
            table = table.set_column(table.column_names.index(stream), stream, taken)
        return table

    def _take(self, rows: Rows) -> pa.Table:
        """Returns rows by their numbers, in the order given."""
        ends = self._live.group_ends
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        groups = np.searchsorted(ends, ordered, side="right")
        bounds = np.flatnonzero(np.diff(groups, prepend=-1, append=len(ends)))
        tables = []
        for start, end in pairwise(bounds.tolist()):
            group = int(groups[start])
            first_row = int(ends[group - 1]) if group else 0
            tables.append(self._group(group).take(pa.array(ordered[start:end] - first_row)))
        if not tables:
            return self._live.schema.empty_table()
        table = concat_rows(tables)
        if (order[1:] > order[:-1]).all():
            return table
        return table.take(pa.array(np.argsort(order)))

    def _group(self, number: int) -> pa.Table:
        table = self._groups.get(number)
        if table is None:
            file, group = self._live.groups[number]
            table = read_row_group(self._store, self._live.paths[file], group, self._columns)
            table = table.replace_schema_metadata(None)
            self._groups[number] = table
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        else:
            self._groups.move_to_end(number)
        return table
