"""Which rows of the index are live, and reading those, a part at a time: for what goes over a whole cache.

Of all rows only identities and generations are held in memory, as numbers; whole rows are read by row groups.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.cache.fragments import Record, ScannedFragment, read_row_group, scan_fragment
from shared.cache.schema import REMOVED, SAMPLE, concat_rows
from shared.cache.winners import RowNumbers, winning_rows
from shared.cache.winners import Rows as Rows
from shared.errors import InputError
from shared.stores.store import Store

_READERS = 16
_GROUPS_KEPT = 48
"""Row groups of the index that are held, so that overlays in the order of what they lie over are read once."""
_BATCH_ROWS = 1 << 16
_BATCHES_AHEAD = 2


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
        InputError: if one cannot be read, or has texts of a stream that the cache does not know.
    """
    streams = [layout.LATENT_STREAM, *(stream for stream in cache.provenance if layout.is_text(stream))]
    wanted = ["sample", REMOVED.name, *(f"{stream}.generation" for stream in streams)]

    def scan(path: str) -> tuple[ScannedFragment, RowNumbers | None]:
        fragment = scan_fragment(cache.store, path, wanted)
        _check_streams(cache, path, fragment.schema.names)
        numbers = None if fragment.is_shared else RowNumbers.of_table(fragment.table, streams)
        return replace(fragment, table=SAMPLE.empty_table()), numbers

    with ThreadPoolExecutor(_READERS) as pool:
        fragments, parts = map(list, zip(*pool.map(scan, paths), strict=True)) if paths else ([], [])
    named = list(zip(paths, fragments, parts, strict=True))
    of_samples = [(path, fragment) for path, fragment, part in named if part is not None]
    shared = tuple(path for path, _, part in named if part is None)
    num_rows = tuple(len(part) for part in parts if part is not None)
    numbers = RowNumbers.joined([part for part in parts if part is not None], streams)
    del named, parts
    winners = winning_rows(numbers)
    starts = np.cumsum([0, *num_rows])
    schemas = dict.fromkeys(fragment.schema.remove_metadata() for _, fragment in of_samples)
    return LiveRows(
        paths=tuple(path for path, _ in of_samples),
        num_rows=num_rows,
        groups=tuple(
            (file, group) for file, (_, fragment) in enumerate(of_samples) for group in range(len(fragment.group_ends))
        ),
        group_ends=np.array(
            [start + end for start, (_, part) in zip(starts, of_samples, strict=False) for end in part.group_ends],
            np.int64,
        ),
        latent=winners.pop(layout.LATENT_STREAM),
        texts=winners,
        removed=_removed(numbers),
        schema=concat_rows([schema.empty_table() for schema in [SAMPLE, *schemas]]).schema,
        shared=shared,
        records={path: fragment.record for path, fragment in zip(paths, fragments, strict=True)},
    )


def _check_streams(cache: Cache, path: str, columns: Sequence[str]) -> None:
    """Raises :class:`InputError` where the columns of a file are of a stream that would be left out."""
    for stream in columns:
        if not layout.is_text(stream) or stream in cache.provenance:
            continue
        description = f"{layout.STREAM_FOLDER}/{stream}.json"
        found = f"{cache.url}/{path}: has texts of the stream {stream}, which"
        if cache.store.size(description) is not None:
            raise InputError(f"{found} was added meanwhile: run again")
        raise InputError(f"{found} {layout.DATASET_FILE} does not describe: bring back {description}")


def _removed(numbers: RowNumbers) -> pa.Table:
    schema = pa.schema([*SAMPLE, REMOVED])
    rows = np.flatnonzero(numbers.removed >= 0)
    table = pa.table({"sample": numbers.samples(rows), REMOVED.name: numbers.removed[rows]}).cast(schema)
    grouped = table.group_by("sample", use_threads=False).aggregate([(REMOVED.name, "max")])
    return grouped.rename_columns({f"{REMOVED.name}_max": REMOVED.name}).select(schema.names).cast(schema)


def read_by_groups(
    store: Store, live: LiveRows, wanted: Sequence[Rows], columns: Sequence[str]
) -> Iterator[tuple[pa.Table, list[tuple[slice, Rows]]]]:
    """Yields the row groups in which there are wanted rows, each once, in order; small ones together.

    Some are read ahead.

    Args:
        store: The cache's.
        live: Its live rows.
        wanted: Lists of numbers of rows, each ascending.
        columns: Parquet paths.

    Yields:
        All rows of some groups, and for each list of ``wanted``: which part of it lies in them, and where there.
    """
    sizes = np.diff(live.group_ends, prepend=0)
    bounds = np.stack([np.searchsorted(rows, np.append(0, live.group_ends)) for rows in wanted])
    counts = np.diff(bounds)
    batches = _batches(np.flatnonzero(counts.any(axis=0)), sizes)

    def joined(groups: Rows, tables: list[Future[pa.Table]]) -> tuple[pa.Table, list[tuple[slice, Rows]]]:
        moved = live.group_ends[groups] - sizes[groups].cumsum()
        parts = [slice(int(ends[groups[0]]), int(ends[groups[-1] + 1])) for ends in bounds]
        places = [
            rows[part] - np.repeat(moved, count[groups])
            for rows, part, count in zip(wanted, parts, counts, strict=True)
        ]
        found = [table.result().replace_schema_metadata(None) for table in tables]
        return concat_rows(found), list(zip(parts, places, strict=True))

    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[tuple[Rows, list[Future[pa.Table]]]] = deque()
        for groups in batches:
            if len(waiting) == _BATCHES_AHEAD:
                yield joined(*waiting.popleft())
            places = [live.groups[group] for group in groups]
            waiting.append(
                (groups, [pool.submit(read_row_group, store, live.paths[f], group, columns) for f, group in places])
            )
        while waiting:
            yield joined(*waiting.popleft())


def _batches(groups: Rows, sizes: Rows) -> list[Rows]:
    """Returns row groups in parts that follow each other, of one group or few rows."""
    batches, begin, num_rows = [], 0, 0
    for place, size in enumerate(sizes[groups].tolist()):
        if place > begin and num_rows + size > _BATCH_ROWS:
            batches.append(groups[begin:place])
            begin, num_rows = place, 0
        num_rows += size
    return [*batches, groups[begin:]] if len(groups) else []


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
