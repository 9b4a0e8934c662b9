"""Snapshots of the index: what compaction leaves of many fragments.

``snapshots/<number>.parquet`` is created only if absent, and so commits a compaction; the newest one counts. It is
small. Its rows are the *shards* that its samples and texts lie in, with what the fragments' records said of each: see
:data:`SHARDS`. Its metadata says which fragments it ``covers``, and which files hold the rows of the index, its
``parts``, in the order in which they are read. Covered are also those that an earlier one covered and that are swept: a
writer that wakes late may create such a fragment once more, and nobody may read it.


``snapshots/<number>-<token>/rows-<n>.parquet``  samples, all streams of one together
``snapshots/<number>-<token>/removed-0.parquet``  samples that were removed, at which generation
``snapshots/<number>-<token>/texts-<n>.parquet``  texts that samples share

A part is a fragment of another name: the same columns, ``format_version`` and, of shared texts, ``kind`` in its
metadata. Rows of samples that were encoded again or removed are left out, so a shard may hold more than its rows say.
"""

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from shared.cache import layout
from shared.cache.fragments import Record, covers_record, fragment_bytes, parts_record, read_table
from shared.cache.schema import FORMAT_VERSION, concat_rows
from shared.stores.store import Store

SHARDS = pa.schema(
    [
        ("shard", pa.string()),
        ("shard_bytes", pa.int64()),
        ("shard_sha256", pa.string()),
        ("kind", pa.string()),
        ("clips_root", pa.string()),
        ("environment", pa.string()),
        ("num_samples", pa.int64()),
    ]
)
"""One row a shard that a snapshot names. ``kind``: ``samples``, or ``texts`` that samples share. ``environment``: JSON.
``num_samples``: that the shard holds, the dead ones too; of shared texts, null."""

PART_ROWS = 1 << 20
GROUP_ROWS = 1 << 16
"""Rows of a Parquet row group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """What is known of a shard besides its rows."""

    shard: str
    """Its path below the cache's root."""
    num_bytes: int
    sha256: str
    kind: str
    """``samples``, or ``texts`` that samples share."""
    clips_root: str
    """The folder of the clips when they were encoded."""
    environment: str
    """JSON: what the shard's bytes depend on besides the provenance."""
    num_samples: int | None = None
    """That it holds, the dead ones too; None where it is not known, or of shared texts."""

    @property
    def folder(self) -> str:
        """The samples' bucket, or a stream's name."""
        return self.shard.split("/")[1]

    @property
    def id(self) -> str:
        """The identity that its name begins with."""
        return self.shard.split("/")[2].partition("-")[0]

    @classmethod
    def of_fragment(cls, record: Record) -> "ShardRecord | None":
        """Returns the shard that a fragment's record names, or None if it names none."""
        if "shard" not in record:
            return None
        return cls(
            shard=record["shard"],
            num_bytes=record["shard_bytes"],
            sha256=record["shard_sha256"],
            kind=record.get("kind", "samples"),
            clips_root=record.get("clips_root", ""),
            environment=json.dumps(record.get("environment", {}), sort_keys=True),
        )

    def fragment_record(self) -> Record:
        """Returns the record of the fragment that commits this shard."""
        return {
            "shard": self.shard,
            "shard_bytes": self.num_bytes,
            "shard_sha256": self.sha256,
            "kind": self.kind,
            "clips_root": self.clips_root,
            "environment": json.loads(self.environment),
        }


def snapshot_number(path: str) -> int:
    """Returns the number in a snapshot's path."""
    return int(path.removeprefix(f"{layout.SNAPSHOT_FOLDER}/").removesuffix(".parquet"))


def read_shards(store: Store, snapshot: str) -> list[ShardRecord]:
    """Returns the shards that a snapshot's rows lie in.

    Raises:
        InputError: if the snapshot cannot be read.
    """
    table = read_table(store, snapshot)
    columns = [table[name].to_pylist() for name in SHARDS.names]
    return [
        ShardRecord(
            shard=shard,
            num_bytes=size,
            sha256=sha256,
            kind=kind,
            clips_root=root,
            environment=environment,
            num_samples=num_samples,
        )
        for shard, size, sha256, kind, root, environment, num_samples in zip(*columns, strict=True)
    ]


def commit_snapshot(
    store: Store, number: int, shards: Iterable[ShardRecord], *, covers: Iterable[str], parts: Iterable[str]
) -> bool:
    """Creates a snapshot unless one of that number exists; returns whether this call did.

    Args:
        store: The cache's.
        number: One more than that of the newest.
        shards: See :data:`SHARDS`.
        covers: Paths of fragments.
        parts: Paths of files with the rows, written before.
    """
    rows = [
        {
            "shard": shard.shard,
            "shard_bytes": shard.num_bytes,
            "shard_sha256": shard.sha256,
            "kind": shard.kind,
            "clips_root": shard.clips_root,
            "environment": shard.environment,
            "num_samples": shard.num_samples,
        }
        for shard in shards
    ]
    table = pa.Table.from_pylist(rows, schema=SHARDS)
    record = {"kind": "snapshot", **covers_record(covers), **parts_record(parts), "writer": secrets.token_hex(8)}
    return store.write_if_absent(f"{layout.SNAPSHOT_FOLDER}/{number:06}.parquet", fragment_bytes(table, record))


class PartWriter:
    """Writes a snapshot's parts; memory holds one part's row group and the file's bytes are on the disk.

    Args:
        store: The cache's.
        folder: Where the parts go; of this compaction alone.
        schema: Of the rows of samples.
    """

    def __init__(self, store: Store, folder: str, schema: pa.Schema) -> None:
        self._store, self._folder, self._schema = store, folder, schema
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self.parts: list[str] = []

    def add(self, rows: pa.Table) -> None:
        """Appends rows of samples, their columns those of the schema or some of them."""
        unified = concat_rows([self._schema.empty_table(), rows])
        self._waiting.append(unified.select(self._schema.names).replace_schema_metadata(None))
        self._num_waiting += rows.num_rows
        if self._num_waiting >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added as a part."""
        if self._num_waiting:
            self.write("rows", pa.concat_tables(self._waiting), {})
            self._waiting, self._num_waiting = [], 0

    def write(self, name: str, table: pa.Table, metadata: Record) -> None:
        """Writes a table as a part."""
        number = sum(path.rpartition("/")[2].startswith(f"{name}-") for path in self.parts)
        path = f"{self._folder}/{name}-{number}.parquet"
        metadata = {"format_version": str(FORMAT_VERSION), **metadata}
        with self._store.new_file() as new:
            pq.write_table(
                table.replace_schema_metadata(metadata), new.file, compression="zstd", row_group_size=GROUP_ROWS
            )
            new.publish(path)
        self.parts.append(path)
