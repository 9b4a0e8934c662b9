"""Compaction: small shards become large ones, and all that the index says stands in one snapshot.

Payloads are copied byte for byte and checked on the way. Nothing is deleted and nothing that exists is changed: a
reader that opened the cache before goes on reading the old shards until ``gc`` takes them; what a job commits meanwhile
is not covered by the snapshot, and so is read beside it. The snapshot's number is given to one compaction only; of two
at once the second drops its work.

A text that lies over an older one comes home where its sample's shard is rewritten. Shards of texts that samples share
are never rewritten: running jobs hold their places. The new shards and parts have a random token in their names, so no
sweep takes them for what an earlier compaction left.
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.cache.fragments import SHARED_KIND, read_covers
from shared.cache.identity import shard_id
from shared.cache.inventory import CHUNK, Inventory, take_inventory
from shared.cache.live import RowReader, Rows
from shared.cache.merges import Merge, ShardUse, plan_merges
from shared.cache.rows import Row
from shared.cache.schema import FORMAT_VERSION, stream_type
from shared.cache.shard_copy import copy_shard
from shared.cache.snapshot import PartWriter, ShardRecord, commit_snapshot, snapshot_number
from shared.errors import InputError
from shared.wording import counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Compaction:
    """What a compaction did."""

    snapshot: str | None
    """Its path; None where there was nothing to do."""
    num_samples: int
    num_fragments: int
    """Newly covered."""
    num_merged: int
    """Shards that were merged."""
    num_shards: int
    """Shards that they were merged into."""

    def __str__(self) -> str:
        if self.snapshot is None:
            return f"nothing to do: {counted(self.num_samples, 'sample')}, no new fragments and no small shards"
        return (
            f"{self.snapshot}: {counted(self.num_samples, 'sample')}; {counted(self.num_fragments, 'fragment')} "
            f"covered, {counted(self.num_merged, 'shard')} merged into {self.num_shards:,}; what is not needed "
            "now goes by gc"
        )


def compact(cache: Cache, shard_bytes: int) -> Compaction:
    """Merges small shards and writes a snapshot of the index.

    Args:
        cache: Opened, of version 2.
        shard_bytes: Of a merged shard at most. Those above a quarter of it stay.

    Raises:
        InputError: if another compaction was faster, a payload is corrupt, or the cache is of version 1.
    """
    if cache.version != FORMAT_VERSION:
        raise InputError(
            f"{cache.url}: format version {cache.version} has no snapshots: bring it to version {FORMAT_VERSION} by "
            "python -m shared.cache convert"
        )
    files = cache.index_files()
    inventory = take_inventory(cache, files)
    merges = _sample_merges(inventory, shard_bytes)
    merged = {use.record.shard for merge in merges for use in merge.sources}
    text_merges = {stream: _text_merges(inventory, stream, merged, shard_bytes) for stream in inventory.live.texts}
    all_merges = [*merges, *(merge for some in text_merges.values() for merge in some)]
    done = Compaction(
        snapshot=None,
        num_samples=len(inventory.live),
        num_fragments=len(files.fragments),
        num_merged=sum(len(merge.sources) for merge in all_merges),
        num_shards=len(all_merges),
    )
    if not files.fragments and not all_merges:
        return done
    number = 1 if files.snapshot is None else snapshot_number(files.snapshot) + 1
    work = _Compaction(cache, inventory, number)
    for stream, some in text_merges.items():
        work.merge_texts(stream, some, merged)
    work.write_rows(merges)
    covers = dict.fromkeys(read_covers(cache.store, files.snapshot) if files.snapshot else [])
    covers.update(dict.fromkeys(files.fragments))
    path = work.commit(list(covers))
    return Compaction(
        snapshot=path,
        num_samples=done.num_samples,
        num_fragments=done.num_fragments,
        num_merged=done.num_merged,
        num_shards=done.num_shards,
    )


def parse_bytes(text: str) -> int:
    """Returns the bytes of a size such as ``1GB`` or ``256MB``.

    Raises:
        InputError: if it is none, or under 1 MB, or over 1 GB.
    """
    for suffix, factor in (("GB", 10**9), ("MB", 10**6)):
        number = text.removesuffix(suffix)
        if number != text and number.isdecimal() and 10**6 <= int(number) * factor <= 10**9:
            return int(number) * factor
    raise InputError(f"--shard-bytes {text}: expected 1MB to 1GB, such as 256MB")


def _sample_merges(inventory: Inventory, shard_bytes: int) -> list[Merge]:
    num_bytes = inventory.latent_bytes.copy()
    for stream in inventory.live.texts:
        num_bytes += np.where(_is_own(inventory, stream), inventory.text_bytes[stream], 0)
    everything = np.ones(len(num_bytes), bool)
    return plan_merges(_uses(inventory, inventory.latent_shard, num_bytes, everything), shard_bytes)


def _text_merges(inventory: Inventory, stream: str, merged: set[str], shard_bytes: int) -> list[Merge]:
    """Returns the merges of shards of texts that lie over those of samples whose shards stay."""
    staying = _staying_texts(inventory, stream, merged)
    return plan_merges(
        _uses(inventory, inventory.text_shard[stream], inventory.text_bytes[stream], staying), shard_bytes
    )


def _staying_texts(inventory: Inventory, stream: str, merged: set[str]) -> np.ndarray:
    """Returns for each live sample (N,) whether its texts lie apart, and do not come home."""
    is_merged = np.array([shard in merged for shard in inventory.shards], bool)
    apart = inventory.text_shard[stream] != inventory.latent_shard
    return _is_own(inventory, stream) & apart & ~is_merged[inventory.latent_shard]


def _is_own(inventory: Inventory, stream: str) -> np.ndarray:
    """Returns for each live sample (N,) whether it has texts that it does not share."""
    is_shared = np.array([inventory.is_shared(shard) for shard in inventory.shards] + [True], bool)
    return ~is_shared[inventory.text_shard[stream]]  # Without texts the number is -1: the last entry.


def _uses(inventory: Inventory, codes: np.ndarray, num_bytes: np.ndarray, chosen: np.ndarray) -> Iterator[ShardUse]:
    samples = np.bincount(codes[chosen], minlength=len(inventory.shards))
    total = np.bincount(codes[chosen], weights=num_bytes[chosen], minlength=len(inventory.shards))
    for number, shard in enumerate(inventory.shards):
        if samples[number] and shard in inventory.records:
            yield ShardUse(
                record=inventory.records[shard], num_samples=int(samples[number]), num_bytes=int(total[number])
            )


@dataclass(slots=True)
class _Moved:
    """Texts that lie in another shard now, one merge behind another."""

    positions: list[Rows] = field(default_factory=list)
    structs: list[pa.Array] = field(default_factory=list)


class _Compaction:
    """One compaction under way."""

    def __init__(self, cache: Cache, inventory: Inventory, number: int) -> None:
        self._store, self._inventory, self._number = cache.store, inventory, number
        self._token = secrets.token_hex(8)
        self._reader = RowReader(cache.store, inventory.live)
        self._folder = f"{layout.SNAPSHOT_FOLDER}/{number:06}-{self._token}"
        schema = pa.schema([entry for entry in inventory.live.schema if entry.name != "removed"])
        for stream in inventory.live.texts:
            if stream not in schema.names:
                schema = schema.append(pa.field(stream, stream_type(stream)))
        self._parts = PartWriter(cache.store, self._folder, schema)
        self._moved = {stream: _Moved() for stream in inventory.live.texts}
        self._named: dict[str, ShardRecord] = {}
        self._new: list[str] = []

    def merge_texts(self, stream: str, merges: list[Merge], merged: set[str]) -> None:
        """Writes the shards of texts that lie apart from their samples.

        Args:
            stream: Of the texts.
            merges: What becomes of what.
            merged: The shards of samples that are rewritten: texts of theirs come home.
        """
        inventory = self._inventory
        by_shard = inventory.positions_by_shard(inventory.text_shard[stream])
        staying = _staying_texts(inventory, stream, merged)
        for merge in merges:
            positions = np.sort(np.concatenate([by_shard[use.record.shard] for use in merge.sources]))
            positions = positions[staying[positions]]
            rows = self._reader.read(positions).select(["sample", stream]).to_pylist()
            table = self._copy(merge, rows, [stream])
            self._moved[stream].positions.append(positions)
            self._moved[stream].structs.append(table[stream].combine_chunks())

    def write_rows(self, merges: list[Merge]) -> None:
        """Writes the merged shards of samples, and the rows of all shards, shard by shard in the order of names."""
        by_shard = self._inventory.positions_by_shard(self._inventory.latent_shard)
        streams = [layout.LATENT_STREAM, *self._inventory.live.texts]
        merge_of = {use.record.shard: merge for merge in merges for use in merge.sources}
        overlays = {stream: _Overlay(moved) for stream, moved in self._moved.items() if moved.positions}
        for shard in sorted(by_shard):
            merge = merge_of.get(shard)
            if merge is None:
                for start in range(0, len(by_shard[shard]), CHUNK):
                    positions = by_shard[shard][start : start + CHUNK]
                    self._add(_overlaid(self._reader.read(positions), positions, overlays))
            elif merge.sources[0].record.shard == shard:
                positions = np.concatenate([by_shard[use.record.shard] for use in merge.sources])
                self._add(self._copy(merge, self._reader.read(positions).to_pylist(), streams))
        self._parts.flush()

    def commit(self, covers: list[str]) -> str:
        """Writes what is not a sample, then the snapshot.

        Raises:
            InputError: if another compaction has the number.
        """
        inventory = self._inventory
        if inventory.live.removed.num_rows:
            self._parts.write("removed", inventory.live.removed, {})
        if inventory.shared_texts.num_rows:
            self._parts.write("texts", inventory.shared_texts, {"kind": SHARED_KIND})
        shared = {shard: record for shard, record in inventory.records.items() if record.kind == SHARED_KIND}
        shards = sorted({**shared, **self._named}.items())
        created = commit_snapshot(
            self._store,
            self._number,
            [record for _, record in shards],
            covers=covers,
            parts=self._parts.parts,
        )
        if not created:
            for path in (*self._parts.parts, *self._new):
                self._store.delete(path)
            raise InputError(
                f"{self._store.url}: another compaction finished first and made snapshot {self._number}: run again "
                "if there is more to do"
            )
        return f"{layout.SNAPSHOT_FOLDER}/{self._number:06}.parquet"

    def _copy(self, merge: Merge, rows: list[Row], streams: list[str]) -> pa.Table:
        """Writes one merged shard and returns the rows with their new places."""
        first = merge.sources[0].record
        into = ShardRecord(
            shard=f"{layout.SHARD_FOLDER}/{first.folder}/"
            + shard_id([self._token, *(use.record.shard for use in merge.sources)], streams=streams),
            num_bytes=0,
            sha256="",
            kind="samples",
            clips_root=first.clips_root,
            environment=first.environment,
        )
        record, table = copy_shard(
            self._store,
            self._store,
            rows,
            into=into,
            container=layout.container_of(first.shard),
            is_copied=lambda shard: not self._inventory.is_shared(shard),
        )
        self._named[record.shard] = record
        self._new.append(record.shard)
        return table

    def _add(self, table: pa.Table) -> None:
        """Appends rows, and notes which shards they name."""
        for shard in _shards_of(table, list(self._inventory.live.texts)):
            if shard not in self._named:
                if shard not in self._inventory.records:
                    raise InputError(
                        f"{self._store.url}/{shard}: rows name it, no fragment does: run preprocess.verify"
                    )
                self._named[shard] = self._inventory.records[shard]
        self._parts.add(table)


def _shards_of(table: pa.Table, streams: list[str]) -> set[str]:
    names: set[str] = set(table[layout.LATENT_STREAM].combine_chunks().field("shard").unique().to_pylist())
    for stream in streams:
        if stream in table.column_names:
            captions = table[stream].combine_chunks().field("captions")
            names.update(captions.flatten().field("shard").unique().to_pylist())
    return names - {None}


class _Overlay:
    """The texts that one stream's merges moved, by the positions of their samples.

    They are never joined: captions of more than 2 GiB do not fit one Arrow array.
    """

    def __init__(self, moved: _Moved) -> None:
        positions = np.concatenate(moved.positions)
        self._order = np.argsort(positions)
        self._positions = positions[self._order]
        self._structs = moved.structs
        self._ends = np.cumsum([len(structs) for structs in moved.structs])

    def find(self, positions: Rows) -> tuple[Rows, Rows]:
        """Returns which of the positions have moved texts, and where those stand among all that moved."""
        places = np.searchsorted(self._positions, positions)
        found = np.flatnonzero(self._positions[np.minimum(places, len(self._positions) - 1)] == positions)
        return found, self._order[places[found]]

    def take(self, rows: Rows) -> pa.Array:
        """Returns texts by their places among all that moved."""
        merges = np.searchsorted(self._ends, rows, side="right")
        pieces, where = [], []
        for merge in np.unique(merges):
            chosen = np.flatnonzero(merges == merge)
            structs = self._structs[merge]
            pieces.append(structs.take(pa.array(rows[chosen] - (self._ends[merge] - len(structs)))))
            where.append(chosen)
        return pa.concat_arrays(pieces).take(pa.array(np.argsort(np.concatenate(where))))


def _overlaid(table: pa.Table, positions: Rows, overlays: dict[str, _Overlay]) -> pa.Table:
    """Returns rows with their texts where they lie now."""
    for stream, overlay in overlays.items():
        found, rows = overlay.find(positions)
        if stream not in table.column_names or not len(found):
            continue
        index = np.arange(table.num_rows)
        index[found] = table.num_rows + np.arange(len(found))
        taken = overlay.take(rows)
        both = pa.chunked_array([*table[stream].chunks, taken], taken.type)
        table = table.set_column(table.column_names.index(stream), stream, both.take(pa.array(index)))
    return table
