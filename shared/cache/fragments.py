"""Fragments of the index: writing one, finding those that count, reading them.

A snapshot (``shared.cache.snapshot``) lists the fragments that it covers and the files that hold its rows, its *parts*,
which are fragments of another name. Readers take the parts of the newest snapshot and the fragments that it does not
cover.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.cache import layout, version1
from shared.cache.ranged_file import RangedFile
from shared.cache.schema import FORMAT_VERSION, SAMPLE, SHARED_TEXT, concat_rows, parquet_bytes
from shared.errors import InputError
from shared.stores.store import Store

Record = dict[str, Any]
"""What stands beside the rows of a fragment: ``shard``, ``shard_bytes``, ``shard_sha256``, ``environment`` and such."""

SHARED_KIND = "texts"
"""The record's ``kind`` of a fragment of texts that samples share."""

_READERS = 16
_COVERS, _PARTS = "covers", "parts"
_SNAPSHOT = re.compile(rf"{layout.SNAPSHOT_FOLDER}/[0-9]{{6}}\.parquet$")


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexFiles:
    """The files of the index that count."""

    snapshot: str | None
    """The newest snapshot's path below the root; its rows lie in ``parts``."""
    parts: tuple[str, ...] = ()
    """Paths of the files that hold the snapshot's rows."""
    fragments: tuple[str, ...]
    """Paths of the fragments that it does not cover, by name."""
    covered: tuple[str, ...] = ()
    """Paths of fragments and snapshots that are still there and that no reader needs."""

    def paths(self) -> list[str]:
        """Returns what readers read, in the order in which equal rows count."""
        return [*self.parts, *self.fragments]


def fragment_path(fragment_id: str) -> str:
    """Returns a fragment's path below the cache's root."""
    return f"{layout.INDEX_FOLDER}/{fragment_id}.parquet"


def write_fragment(store: Store, fragment_id: str, table: pa.Table, record: Mapping[str, Any]) -> bool:
    """Creates a fragment unless one of that identity exists; returns whether this call did."""
    return store.write_if_absent(fragment_path(fragment_id), fragment_bytes(table, record))


def fragment_bytes(table: pa.Table, record: Mapping[str, Any]) -> bytes:
    """Returns a fragment as a file: rows, and the record as JSON values in the Parquet metadata."""
    metadata = {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for name, value in record.items()
    }
    return parquet_bytes(table, {"format_version": str(FORMAT_VERSION), **metadata})


def read_record(store: Store, fragment: str) -> Record:
    """Returns the record of a fragment, by its identity or its path.

    Raises:
        InputError: if the fragment cannot be read.
    """
    path = fragment if "/" in fragment else fragment_path(fragment)
    with _opened(store, path) as file:
        return record_of(file)


def record_of(file: pq.ParquetFile) -> Record:
    """Returns the record of an opened fragment."""
    metadata = file.metadata.metadata or {}
    record: Record = {}
    for key, value in metadata.items():
        name, text = key.decode(), value.decode()
        record[name] = json.loads(text) if name in ("environment", "shard_bytes") else text
    return record


def find_files(store: Store) -> IndexFiles:
    """Returns the files of the index that count. Lists the folders of the index only."""
    snapshots = find_snapshots(store)
    # Fragments are listed last: one that a newer snapshot covers may be swept, but then that snapshot was seen.
    fragments = [entry.path for entry in store.list(layout.INDEX_FOLDER) if entry.path.endswith(".parquet")]
    if not snapshots:
        return IndexFiles(snapshot=None, fragments=tuple(fragments))
    record = read_record(store, snapshots[-1])
    covers = _covers(record)
    return IndexFiles(
        snapshot=snapshots[-1],
        parts=tuple(_lines(record, _PARTS)),
        fragments=tuple(path for path in fragments if path not in covers),
        covered=(*snapshots[:-1], *(path for path in fragments if path in covers)),
    )


def find_snapshots(store: Store) -> list[str]:
    """Returns the paths of all snapshots, the newest last."""
    return sorted(entry.path for entry in store.list(layout.SNAPSHOT_FOLDER) if _SNAPSHOT.match(entry.path))


def read_covers(store: Store, snapshot: str) -> list[str]:
    """Returns the paths of the fragments that a snapshot covers."""
    return list(_covers(read_record(store, snapshot)))


def read_parts(store: Store, snapshot: str) -> list[str]:
    """Returns the paths of the files that hold a snapshot's rows."""
    return _lines(read_record(store, snapshot), _PARTS)


def parts_record(parts: Iterable[str]) -> Record:
    """Returns the part of a snapshot's record that says which files (paths) hold its rows."""
    return {_PARTS: "\n".join(parts)}


def _covers(record: Record) -> dict[str, None]:
    return {fragment_path(name): None for name in _lines(record, _COVERS)}


def _lines(record: Record, name: str) -> list[str]:
    return [line for line in record.get(name, "").split("\n") if line]


def covers_record(fragments: Iterable[str]) -> Record:
    """Returns the part of a snapshot's record that says which fragments (paths) it covers."""
    return {
        _COVERS: "\n".join(path.removeprefix(f"{layout.INDEX_FOLDER}/").removesuffix(".parquet") for path in fragments)
    }


def read_rows(store: Store, paths: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Returns the rows of fragments of samples, one fragment behind another; texts that stand alone are left out.

    Args:
        store: The cache's.
        paths: Of fragments and snapshots.
        columns: Parquet paths such as ``sample`` or ``latent.offset``; all by default.

    Raises:
        InputError: if a fragment cannot be read or lacks the column ``sample``.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda path: read_fragment(store, path, columns), paths))
    tables = [table for table in tables if not _is_shared(table)]
    if not tables:
        return SAMPLE.empty_table()
    return concat_rows([table.replace_schema_metadata(None) for table in tables])


def read_shared_texts(store: Store, paths: Sequence[str]) -> pa.Table:
    """Returns the texts that samples share, of fragments that hold such."""
    return pa.concat_tables([SHARED_TEXT.empty_table(), *shared_text_tables(store, paths)])


def shared_text_tables(store: Store, paths: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yields the texts that samples share, a table of each fragment that holds such; a few are read ahead.

    Args:
        store: The cache's.
        paths: Of fragments and parts of snapshots.
        columns: Parquet paths; all by default.
    """

    def read(path: str) -> pa.Table | None:
        with _opened(store, path) as file:
            if (file.metadata.metadata or {}).get(b"kind") != SHARED_KIND.encode():
                return None
        return read_fragment(store, path, columns).replace_schema_metadata(None)

    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(paths), _READERS):
            for table in pool.map(read, paths[start : start + _READERS]):
                if table is not None:
                    yield table


def _is_shared(table: pa.Table) -> bool:
    return (table.schema.metadata or {}).get(b"kind") == SHARED_KIND.encode()


def read_fragment(store: Store, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Returns the rows of one fragment, in version 2 whatever it was written in; its metadata stays with it.

    Raises:
        InputError: if it cannot be read.
    """
    with _opened(store, path) as file:
        return _read(file, columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScannedFragment:
    """What stands in one fragment besides most of its columns."""

    record: Record
    schema: pa.Schema
    """Of all its columns, in version 2."""
    group_ends: tuple[int, ...]
    """The number of rows up to the end of each of its row groups; of version 1, of the one that stands for all."""
    table: pa.Table
    """The columns that were asked for."""

    @property
    def is_shared(self) -> bool:
        """Whether its rows are texts that samples share."""
        return _is_shared(self.table)


def scan_fragment(store: Store, path: str, columns: Sequence[str]) -> ScannedFragment:
    """Returns some columns of a fragment and what there is to know of it; a stream's fields only as far as asked for.

    Raises:
        InputError: if it cannot be read.
    """
    with _opened(store, path) as file:
        table = _read(file, columns)
        metadata = file.metadata
        if _version(file) == "1":
            return ScannedFragment(
                record=record_of(file), schema=table.schema, group_ends=(table.num_rows,), table=table
            )
        ends, end = [], 0
        for group in range(metadata.num_row_groups):
            end += metadata.row_group(group).num_rows
            ends.append(end)
        return ScannedFragment(record=record_of(file), schema=file.schema_arrow, group_ends=tuple(ends), table=table)


def read_row_group(store: Store, path: str, group: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Returns one row group of a fragment; of version 1, all of it.

    Raises:
        InputError: if it cannot be read.
    """
    with _opened(store, path) as file:
        if _version(file) == "1":
            return _read(file, None)
        return file.read_row_group(group, columns=None if columns is None else list(columns))


def _version(file: pq.ParquetFile) -> str:
    return (file.metadata.metadata or {}).get(b"format_version", b"").decode()


def _read(file: pq.ParquetFile, columns: Sequence[str] | None) -> pa.Table:
    version = _version(file)
    if version == "1":
        return version1.upgrade(file.read())
    if version != str(FORMAT_VERSION):
        raise ValueError(f"format version {version!r}, expected 1 or {FORMAT_VERSION}")
    table = file.read(columns=None if columns is None else list(columns))
    if not _is_shared(table) and "sample" not in table.column_names:
        raise KeyError("it has no column sample")
    return table


def read_table(store: Store, path: str) -> pa.Table:
    """Returns a Parquet file of the cache that is no fragment, such as one of the ledger's.

    Raises:
        InputError: if it cannot be read.
    """
    with _opened(store, path) as file:
        return file.read()


@contextmanager
def _opened(store: Store, path: str) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file of a store; what is wrong with it becomes one line."""
    local = store.local_path(path)
    source: Any
    try:
        if local is not None:
            source = local
        elif path.startswith(f"{layout.SNAPSHOT_FOLDER}/"):  # Large: only the columns that are wanted are fetched.
            source = pa.PythonFile(RangedFile(store, path), mode="r")
        else:
            source = io.BytesIO(store.read(path))
        with pq.ParquetFile(source, memory_map=True, pre_buffer=local is None) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"{store.url}/{path}: not readable ({error}): run preprocess.verify") from None
