"""Copying live payloads into a new shard, byte for byte and checked on the way; what convert and compact share."""

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from shared.cache import layout
from shared.cache.commit import shard_file
from shared.cache.reader import StreamReader
from shared.cache.rows import Place, Row, describe, payload_shape, places, streams_of
from shared.cache.schema import SHARED, rows_table
from shared.cache.shard_file import StoredArray
from shared.cache.snapshot import ShardRecord
from shared.codec import Codec
from shared.errors import InputError
from shared.stores.store import Store

_BATCH_BYTES = 64 * 1024 * 1024
"""Payloads held at once."""


def copy_shard(
    source: Store,
    target: Store,
    rows: Sequence[Row],
    *,
    into: ShardRecord,
    container: layout.Container,
    is_copied: Callable[[str], bool],
) -> tuple[ShardRecord, pa.Table]:
    """Writes one shard with payloads of other shards and returns its record and its rows of the index.

    Nothing names the shard yet: it counts from the moment in which a fragment or a snapshot does.

    Args:
        source: The store of the cache that has the payloads.
        target: The store of the cache that gets the shard.
        rows: Live rows, at least one, each with a payload that is copied; their places are changed.
        into: Folder and identity of the shard, and what its record keeps; bytes and hash do not count.
        container: Of the shard.
        is_copied: Whether payloads in a shard are copied. Places in other shards stay as they are.

    Raises:
        InputError: if a payload is missing or corrupt.
    """
    with target.new_file() as new:
        shard = shard_file(container, new.file)
        written: list[Place] = []
        for row, payloads in _with_payloads(source, rows, is_copied):
            arrays: dict[str, list[StoredArray]] = {}
            for stream, place, payload in payloads:
                array = StoredArray(
                    payload=payload,
                    codec=Codec.parse(place["codec"]),
                    shape=payload_shape(row, stream, place),
                )
                arrays.setdefault(stream, []).append(array)
            key = row[SHARED]["id"] if SHARED in row else row["sample"]
            extents = shard.add(key, arrays, describe(row, arrays))
            found = [extent for stream in arrays for extent in extents[stream]]
            for (_, place, _), extent in zip(payloads, found, strict=True):
                place.update(offset=extent.offset, bytes=extent.num_bytes, crc32c=extent.crc32c)
                written.append(place)
        sha256, num_bytes = shard.finish()
        name = layout.shard_object(into.folder, into.id, sha256, container)
        new.publish(name)
    for place in written:
        place["shard"] = name
    record = ShardRecord(
        shard=name,
        num_bytes=num_bytes,
        sha256=sha256,
        kind=into.kind,
        clips_root=into.clips_root,
        environment=into.environment,
        num_samples=len(rows),
    )
    return record, rows_table(_with_same_columns(rows))


_Payload = tuple[str, Place, bytes]
"""Stream, place, stored bytes."""


def _with_payloads(
    store: Store, rows: Sequence[Row], is_copied: Callable[[str], bool]
) -> Iterator[tuple[Row, list[_Payload]]]:
    """Yields each row with its payloads that are copied, read some rows at a time."""
    batch: list[tuple[Row, list[tuple[str, Place]]]] = []
    num_bytes = 0
    for row in rows:
        wanted = [
            (stream, place) for stream in _streams(row) for place in places(row, stream) if is_copied(place["shard"])
        ]
        assert wanted, row
        batch.append((row, wanted))
        num_bytes += sum(place["bytes"] for _, place in wanted)
        if num_bytes >= _BATCH_BYTES:
            yield from _read(store, batch)
            batch, num_bytes = [], 0
    yield from _read(store, batch)


def _streams(row: Row) -> list[str]:
    return [row[SHARED]["shard"].split("/")[1]] if SHARED in row else streams_of(row)


def _read(store: Store, batch: Sequence[tuple[Row, list[tuple[str, Place]]]]) -> Iterator[tuple[Row, list[_Payload]]]:
    by_shard: dict[str, list[Place]] = {}
    for _, wanted in batch:
        for _, place in wanted:
            by_shard.setdefault(place["shard"], []).append(place)
    reader = StreamReader(store)
    payloads: dict[int, bytes] = {}
    for shard, wanted_places in by_shard.items():
        try:
            found = store.read_ranges(shard, [(place["offset"], place["bytes"]) for place in wanted_places])
        except FileNotFoundError:
            raise InputError(f"{store.url}/{shard}: the shard is missing: run preprocess.verify") from None
        for place, data in zip(wanted_places, found, strict=True):
            payloads[id(place)] = reader.checked(place, data)
    for row, wanted in batch:
        yield row, [(stream, place, payloads.pop(id(place))) for stream, place in wanted]


def _with_same_columns(rows: Sequence[Row]) -> list[Row]:
    """Returns rows with the columns that any of them has something in."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return [{name: row[name] for name in names} for row in rows]
