"""In which shards the live payloads of a cache lie: what convert, compact, gc and urls decide by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.cache.fragments import IndexFiles, read_shared_texts
from shared.cache.live import LiveRows, RowReader, Rows, find_live
from shared.cache.snapshot import ShardRecord, read_shards

Codes = npt.NDArray[np.int32]

CHUNK = 1 << 16
"""Live samples that are looked at together."""
_NONE = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """The live samples N of a cache and the shards that they name."""

    live: LiveRows
    shards: tuple[str, ...]
    """By number: every shard that a live sample names."""
    latent_shard: Codes
    """(N,): the number of the shard with the sample's latent."""
    text_shard: dict[str, Codes]
    """By stream (N,): the number of the shard with the sample's first text, -1 where it has none."""
    latent_bytes: npt.NDArray[np.int64]
    """(N,): of the payloads."""
    text_bytes: dict[str, npt.NDArray[np.int64]]
    """By stream (N,): of the payloads of all the sample's texts."""
    records: dict[str, ShardRecord]
    """By shard, also those that no live sample names."""
    shared_texts: pa.Table
    """The texts that samples share, each once."""

    def positions_by_shard(self, codes: Codes) -> dict[str, Rows]:
        """Returns by shard the positions (n,) of the live samples with that code, ascending.

        Args:
            codes: ``latent_shard``, or one of ``text_shard``.
        """
        order = np.argsort(codes, kind="stable")
        bounds = np.searchsorted(codes[order], np.arange(len(self.shards) + 1))
        return {
            shard: order[bounds[number] : bounds[number + 1]]
            for number, shard in enumerate(self.shards)
            if bounds[number] < bounds[number + 1]
        }

    def is_shared(self, shard: str) -> bool:
        """Returns whether a shard holds texts that samples share."""
        return shard in self.records and self.records[shard].kind == "texts"


def take_inventory(cache: Cache, files: IndexFiles) -> Inventory:
    """Returns where the live payloads of a cache lie.

    Args:
        cache: Opened.
        files: The files of its index that count.

    Raises:
        InputError: if one cannot be read.
    """
    live = find_live(cache, files.paths())
    records = (
        {} if files.snapshot is None else {shard.shard: shard for shard in read_shards(cache.store, files.snapshot)}
    )
    num_rows = dict(zip(live.paths, live.num_rows, strict=True))
    for path, record in live.records.items():
        if (shard := ShardRecord.of_fragment(record)) is not None:
            records.setdefault(shard.shard, replace(shard, num_samples=num_rows.get(path)))
    streams = list(live.texts)
    columns = [f"{layout.LATENT_STREAM}.{name}" for name in ("shard", "bytes")]
    columns += [f"{stream}.captions.list.element.{name}" for stream in streams for name in ("shard", "bytes")]
    reader = RowReader(cache.store, live, ["sample", *columns])
    numbers: dict[str, int] = {}
    latents: list[tuple[Codes, Rows]] = []
    texts: dict[str, list[tuple[Codes, Rows]]] = {stream: [] for stream in streams}
    for positions in chunks(len(live)):
        table = reader.read(positions)
        latent = _combined(table[layout.LATENT_STREAM])
        latents.append((_codes(latent.field("shard"), numbers), _integers(latent.field("bytes"))))
        for stream in streams:
            texts[stream].append(_first_texts(table, stream, numbers))
    latent_shard, latent_bytes = _joined(latents)
    joined = {stream: _joined(parts) for stream, parts in texts.items()}
    return Inventory(
        live=live,
        shards=tuple(numbers),
        latent_shard=latent_shard,
        text_shard={stream: shards for stream, (shards, _) in joined.items()},
        latent_bytes=latent_bytes,
        text_bytes={stream: num_bytes for stream, (_, num_bytes) in joined.items()},
        records=records,
        shared_texts=_distinct_texts(read_shared_texts(cache.store, live.shared)),
    )


def chunks(num_samples: int) -> Iterator[Rows]:
    """Yields the positions 0 to ``num_samples`` in pieces."""
    for start in range(0, num_samples, CHUNK):
        yield np.arange(start, min(start + CHUNK, num_samples))


def _first_texts(table: pa.Table, stream: str, numbers: dict[str, int]) -> tuple[Codes, Rows]:
    """Returns the shard of each row's first text and the bytes of all its texts."""
    codes, sums = np.full(table.num_rows, _NONE, np.int32), np.zeros(table.num_rows, np.int64)
    if stream not in table.column_names:
        return codes, sums
    captions = pc.struct_field(_combined(table[stream]), "captions")
    lengths = _integers(pc.fill_null(pc.list_value_length(captions), 0))
    entries = captions.flatten()
    starts = np.cumsum(lengths) - lengths
    present = lengths > 0
    if present.any():
        codes[present] = _codes(entries.field("shard"), numbers)[starts[present]]
        sums[present] = np.add.reduceat(_integers(entries.field("bytes")), starts[present])
    return codes, sums


def _codes(names: pa.Array, numbers: dict[str, int]) -> Codes:
    encoded = names.dictionary_encode()
    of_names = [numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.to_pylist()]
    return np.array(of_names, np.int32)[encoded.indices.to_numpy()]


def _combined(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _integers(array: pa.Array) -> Rows:
    return array.to_numpy(zero_copy_only=False).astype(np.int64)


def _joined(parts: Sequence[tuple[Codes, Rows]]) -> tuple[Codes, Rows]:
    if not parts:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    return np.concatenate([codes for codes, _ in parts]), np.concatenate([values for _, values in parts])


def _distinct_texts(table: pa.Table) -> pa.Table:
    """Returns texts without those whose shard has the stream and identity of one before."""
    if table.num_rows == 0:
        return table
    text = _combined(table["text"])
    seen: set[tuple[str, str]] = set()
    kept = []
    for row, (shard, identity) in enumerate(
        zip(text.field("shard").to_pylist(), text.field("id").to_pylist(), strict=True)
    ):
        key = (shard.split("/")[1], identity)
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return table.take(pa.array(kept, pa.int64()))
