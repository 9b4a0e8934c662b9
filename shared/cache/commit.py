"""Committing a shard exactly once.

The shard is written under a temporary name and made durable under its final one; then its index fragment, which names
the shard, is created only if no fragment of that identity exists. A writer that dies before the fragment leaves an
orphan that nobody reads; of two writers of one shard the second's work is dropped.
"""

import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa

from shared.cache import layout, rows
from shared.cache.dataset import CommittedShard
from shared.cache.fragments import Record, fragment_path, read_record, write_fragment
from shared.cache.rows import Row
from shared.cache.schema import SHARED, rows_table
from shared.cache.shard_file import ShardFile, StoredArray
from shared.cache.tar import TarShardWriter
from shared.cache.zarr_zip import ZarrShardWriter
from shared.errors import InputError
from shared.stores.store import Store


def shard_file(container: layout.Container, file: BinaryIO) -> ShardFile:
    """Returns the writer of a container."""
    return TarShardWriter(file) if container == "tar" else ZarrShardWriter(file)


class ShardWriter:
    """Collects rows and their payloads into one shard; nothing is seen of it before :meth:`commit`.

    Use as a context manager, so that an error leaves no temporary file.

    Args:
        store: The cache's.
        shard_id: The shard's identity, from the members that were planned for it.
        folder: The samples' bucket, or a stream's name where the shard holds texts alone.
        container: Tar or Zarr.
        record: Kept beside the rows, e.g. ``clips_root`` and ``environment``: what the shard's bytes depend on.
    """

    def __init__(
        self, store: Store, *, shard_id: str, folder: str, container: layout.Container, record: Mapping[str, Any]
    ) -> None:
        self._store, self._shard_id, self._folder, self._container = store, shard_id, folder, container
        self._record = dict(record)
        self._rows: list[Row] = []
        self._unplaced: list[rows.Place] = []
        self._stack = ExitStack()

    def __enter__(self) -> "ShardWriter":
        self._file = self._stack.enter_context(self._store.new_file())
        self._shard = shard_file(self._container, self._file.file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def add(self, row: Row, arrays: Mapping[str, Sequence[StoredArray]]) -> None:
        """Appends a row of the index with its payloads.

        Args:
            row: Its places lack ``shard``, except those of payloads that lie in another shard.
            arrays: By stream, the payloads of the places that lack it.
        """
        key = row[SHARED]["id"] if SHARED in row else row["sample"]
        arrays = {stream: stored for stream, stored in arrays.items() if stored}
        extents = self._shard.add(key, arrays, rows.describe(row, arrays))
        for stream, found in extents.items():
            lacking = [place for place in rows.places(row, stream) if "shard" not in place]
            for place, extent in zip(lacking, found, strict=True):
                place.update(offset=extent.offset, bytes=extent.num_bytes, crc32c=extent.crc32c)
            self._unplaced.extend(lacking)
        self._rows.append(row)

    def record(self, name: str, value: Any) -> None:
        """Records something more beside the rows."""
        self._record[name] = value

    def commit(self) -> CommittedShard:
        """Makes the shard durable and visible. Without rows nothing is written."""
        if not self._rows:
            return CommittedShard(shard="", num_samples=0, num_bytes=0, created=False)
        sha256, num_bytes = self._shard.finish()
        name = layout.shard_object(self._folder, self._shard_id, sha256, self._container)
        for place in self._unplaced:
            place["shard"] = name
        self._file.publish(name)
        record: Record = {**self._record, "shard": name, "shard_bytes": num_bytes, "shard_sha256": sha256}
        created = commit_rows(self._store, self._shard_id, rows_table(self._rows), record)
        if not created and read_record(self._store, self._shard_id).get("shard") != name:
            self._store.delete(name)
        if created and self._store.size(name) is None:
            self._store.delete(fragment_path(self._shard_id))
            raise InputError(
                f"{self._store.url}/{name}: was swept before it was committed: this worker was paused for longer than "
                "the age that gc keeps: run the job again"
            )
        return CommittedShard(shard=name, num_samples=len(self._rows), num_bytes=num_bytes, created=created)


def commit_rows(store: Store, fragment_id: str, table: pa.Table, record: Record) -> bool:
    """Creates an index fragment unless one of its identity exists; returns whether this call did.

    The record gets a random ``writer``, so that a writer whose store lost the answer can tell its own from another's.
    """
    return write_fragment(store, fragment_id, table, {**record, "writer": secrets.token_hex(8)})
