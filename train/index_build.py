"""From the index of a cache, a table, to columns in storage order. Pure."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache.resolve import sample_numbers
from shared.errors import InputError
from shared.spec import Bucket
from train.index_columns import Array, IndexColumns, Payloads

PLACE = ("shard", "offset", "bytes", "crc32c", "codec")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltIndex:
    """Columns, and what there is to know of them."""

    columns: IndexColumns
    shards: list[str]
    codecs: list[str]
    buckets: list[dict[str, Any]]
    """``bucket``, ``first_row``, ``num_samples``, ``mean_bytes``, ``fps`` (median), ``latent_shape``; by bucket."""
    digest: str
    """Of the samples' identities and places: the plan of a run depends on them."""


def index_paths(text_stream: str) -> list[str]:
    """Returns the Parquet paths that :func:`build_columns` needs."""
    captions = f"{text_stream}.captions.list.element"
    return [
        *("num_frames", "height", "width", "fps", "latent.shape"),
        *(f"latent.{name}" for name in PLACE),
        *(f"{captions}.{name}" for name in (*PLACE, "num_tokens")),
        f"{text_stream}.channels",
    ]


def build_columns(table: pa.Table, text_stream: str) -> BuiltIndex:
    """Returns the columns of a table of the index (at least one row) in storage order.

    Raises:
        InputError: if a sample lacks its latent or its texts, or a bucket's latents differ in shape.
    """
    texts = _struct(table, text_stream)
    lists = _combined(texts.field("captions"))
    num_captions = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
    _require_complete(table, text_stream, num_captions)
    latent = _struct(table, "latent")
    entries = lists.flatten()
    codes = _Dictionary(), _Dictionary()
    latents, captions = _payloads(latent, *codes), _payloads(entries, *codes)
    shards, shard_order = codes[0].sorted()
    codecs, codec_order = codes[1].sorted()
    latents, captions = (_renumbered(p, shard_order, codec_order) for p in (latents, captions))

    sizes = np.stack([table[name].to_numpy() for name in ("num_frames", "height", "width")], axis=1)
    packed = (sizes.astype(np.int64) * np.array([1 << 42, 1 << 21, 1])).sum(axis=1)
    order = np.lexsort((latents.offset, latents.shard, packed))
    identity = sample_numbers(table["sample"])[order]
    caption_rows = _rows_of_lists(num_captions, order)
    columns = IndexColumns(
        identity=identity,
        latent=latents.take(order),
        caption_start=np.concatenate([[0], num_captions[order].cumsum()]).astype(np.int64),
        caption=captions.take(caption_rows),
        num_tokens=np.asarray(entries.field("num_tokens")).astype(np.uint16)[caption_rows],
    )
    shapes = np.asarray(_combined(latent.field("shape")).flatten()).reshape(len(order), -1)[order]
    buckets = _buckets(packed[order], sizes[order], table["fps"].to_numpy()[order], columns, shapes, identity)
    digest = hashlib.sha256()
    for array in (identity, columns.latent.shard, columns.latent.offset):
        digest.update(np.ascontiguousarray(array).data)
    return BuiltIndex(columns=columns, shards=shards, codecs=codecs, buckets=buckets, digest=digest.hexdigest())


class _Dictionary:
    """Strings as numbers."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def encode(self, column: pa.Array) -> Array:
        encoded = column.dictionary_encode() if not pa.types.is_dictionary(column.type) else column
        numbers = [self._numbers.setdefault(name, len(self._numbers)) for name in encoded.dictionary.to_pylist()]
        return np.array(numbers, dtype=np.int32)[np.asarray(encoded.indices)]

    def sorted(self) -> tuple[list[str], Array]:
        """Returns the strings by name, and each number's place among them."""
        names = sorted(self._numbers)
        order = np.empty(len(names), dtype=np.int32)
        order[[self._numbers[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        return names, order


def _combined(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _struct(table: pa.Table, name: str) -> pa.StructArray:
    return _combined(table[name])


def _payloads(places: pa.StructArray, shards: _Dictionary, codecs: _Dictionary) -> Payloads:
    return Payloads(
        shard=shards.encode(places.field("shard")),
        offset=np.asarray(places.field("offset")).astype(np.int64),
        num_bytes=np.asarray(places.field("bytes")).astype(np.int64),
        crc32c=np.asarray(pc.fill_null(places.field("crc32c"), -1)).astype(np.int64),
        codec=codecs.encode(places.field("codec")),
    )


def _renumbered(payloads: Payloads, shards: Array, codecs: Array) -> Payloads:
    return Payloads(
        shard=shards[payloads.shard],
        offset=payloads.offset,
        num_bytes=payloads.num_bytes,
        crc32c=payloads.crc32c,
        codec=codecs[payloads.codec].astype(np.uint8),
    )


def _rows_of_lists(lengths: Array, order: Array) -> Array:
    """Returns where the elements of lists lie once the lists are put in ``order``."""
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    taken = lengths[order]
    ends = taken.cumsum()
    return np.arange(int(taken.sum())) - np.repeat(ends - taken, taken) + np.repeat(starts[order], taken)


def _require_complete(table: pa.Table, text_stream: str, num_captions: Array) -> None:
    without_latent = np.flatnonzero(~np.asarray(pc.is_valid(_struct(table, "latent")).cast(pa.uint8())).astype(bool))
    without_text = np.flatnonzero(num_captions == 0)
    for stream, rows in (("latent", without_latent), (text_stream, without_text)):
        if len(rows):
            raise InputError(
                f"{len(rows)} samples have nothing in stream {stream!r}, sample {table['sample'][int(rows[0])]} among "
                "them: run preprocess into the cache again to complete it"
            )


def _buckets(
    packed: Array, sizes: Array, fps: Array, columns: IndexColumns, shapes: Array, identity: Array
) -> list[dict[str, Any]]:
    firsts = np.flatnonzero(np.concatenate([[True], packed[1:] != packed[:-1]]))
    caption_bytes = np.add.reduceat(columns.caption.num_bytes, columns.caption_start[:-1])
    result = []
    for first, end in zip(firsts.tolist(), [*firsts[1:].tolist(), len(packed)], strict=True):
        bucket = Bucket(*map(int, sizes[first]))
        other = np.flatnonzero((shapes[first:end] != shapes[first]).any(axis=1))
        if len(other):
            row = first + int(other[0])
            raise InputError(
                f"sample {identity[row, 0]:016x}{identity[row, 1]:016x} of bucket {bucket} has a latent of shape "
                f"{tuple(shapes[row].tolist())}, others have {tuple(shapes[first].tolist())}: run preprocess.verify"
            )
        result.append(
            {
                "bucket": str(bucket),
                "first_row": first,
                "num_samples": end - first,
                "mean_bytes": float((columns.latent.num_bytes[first:end] + caption_bytes[first:end]).mean()),
                "fps": float(np.median(fps[first:end])),
                "latent_shape": shapes[first].tolist(),
            }
        )
    return result
