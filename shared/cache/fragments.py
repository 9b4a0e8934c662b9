"""Fragments and snapshots of the index: writing one, finding those that count, reading them.

A snapshot is a fragment that lists what it covers: readers take the newest one and the fragments that it does not
cover.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.cache import layout, version1
from shared.cache.schema import FORMAT_VERSION, SAMPLE, SHARED_TEXT, parquet_bytes
from shared.errors import InputError
from shared.stores.store import Store

Record = dict[str, Any]
"""What stands beside the rows of a fragment: ``shard``, ``shard_bytes``, ``shard_sha256``, ``environment`` and such."""

SHARED_KIND = "texts"
"""The record's ``kind`` of a fragment of texts that samples share."""

_READERS = 16
_COVERS = "covers"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexFiles:
    """The files of the index that count."""

    snapshot: str | None
    """The newest snapshot's path below the root."""
    fragments: tuple[str, ...]
    """Paths of the fragments that it does not cover, by name."""
    covered: tuple[str, ...] = ()
    """Paths of fragments and snapshots that are still there and that no reader needs."""

    def paths(self) -> list[str]:
        """Returns what readers read, in the order in which equal rows count."""
        return [*([self.snapshot] if self.snapshot else []), *self.fragments]


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
    snapshots = sorted(entry.path for entry in store.list(layout.SNAPSHOT_FOLDER) if entry.path.endswith(".parquet"))
    fragments = [entry.path for entry in store.list(layout.INDEX_FOLDER) if entry.path.endswith(".parquet")]
    if not snapshots:
        return IndexFiles(snapshot=None, fragments=tuple(fragments))
    covers = set(read_covers(store, snapshots[-1]))
    return IndexFiles(
        snapshot=snapshots[-1],
        fragments=tuple(path for path in fragments if path not in covers),
        covered=(*snapshots[:-1], *(path for path in fragments if path in covers)),
    )


def read_covers(store: Store, snapshot: str) -> list[str]:
    """Returns the paths of the fragments that a snapshot covers."""
    text = read_record(store, snapshot).get(_COVERS, "")
    return [fragment_path(name) for name in text.split("\n") if name]


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
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables], promote_options="permissive")


def read_shared_texts(store: Store, paths: Sequence[str]) -> pa.Table:
    """Returns the texts that samples share, of fragments that hold such."""
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda path: read_fragment(store, path), paths))
    shared = [table.replace_schema_metadata(None) for table in tables if _is_shared(table)]
    return pa.concat_tables([SHARED_TEXT.empty_table(), *shared])


def _is_shared(table: pa.Table) -> bool:
    return (table.schema.metadata or {}).get(b"kind") == SHARED_KIND.encode()


def read_fragment(store: Store, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Returns the rows of one fragment, in version 2 whatever it was written in; its metadata stays with it.

    Raises:
        InputError: if it cannot be read.
    """
    with _opened(store, path) as file:
        version = (file.metadata.metadata or {}).get(b"format_version", b"").decode()
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
    try:
        source = io.BytesIO(store.read(path)) if local is None else local
        with pq.ParquetFile(source, memory_map=True) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"{store.url}/{path}: not readable ({error}): run preprocess.verify") from None
