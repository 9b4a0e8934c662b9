"""From one container to the other: the same samples, the same payloads byte for byte, another kind of file.

Every shard with something live becomes a shard of the same identity, and a fragment of that identity commits it. So a
conversion that was stopped goes on where it was, and two at once do nothing twice. What is dead is left behind.
"""

from collections.abc import Callable
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import layout
from shared.cache.card import write_card
from shared.cache.commit import commit_rows
from shared.cache.dataset import Cache, Provenance
from shared.cache.fragments import fragment_path, read_record
from shared.cache.identity import shard_id
from shared.cache.inventory import Inventory, chunks, take_inventory
from shared.cache.live import RowReader, Rows
from shared.cache.rows import Place, Row
from shared.cache.shard_copy import copy_shard
from shared.errors import InputError


def convert(source: Cache, target_url: str, container: layout.Container) -> tuple[int, int]:
    """Copies a cache into another container; run again, it does what is missing.

    Args:
        source: Of version 1 or 2. Not to be compacted before the conversion is done.
        target_url: A new folder or URL, or what a conversion of the same cache left there.
        container: Of the new shards.

    Returns:
        The shards written by this call, and those that were there.

    Raises:
        InputError: if the target holds something else, or a payload is missing or corrupt.
    """
    inventory = take_inventory(source, source.index_files())
    provenance = _with_codecs(source, inventory)
    target = _open_target(source, target_url, provenance)
    conversion = _Conversion(source, target, inventory, container)
    conversion.copy_shared_texts()
    conversion.copy_samples()
    conversion.copy_texts()
    _copy_removals(target, inventory.live.removed)
    for folder in (layout.NULL_FOLDER, layout.LEDGER_FOLDER):
        for entry in source.store.list(folder):
            target.store.write_if_absent(entry.path, source.store.read(entry.path))
    write_card(target)
    return conversion.num_written, conversion.num_present


class _Conversion:
    """One run: counts, and what all shards need."""

    def __init__(self, source: Cache, target: Cache, inventory: Inventory, container: layout.Container) -> None:
        self._source, self._target = source.store, target.store
        self._inventory, self._container = inventory, container
        self._reader = RowReader(source.store, inventory.live)
        self._shared: dict[tuple[str, str], Place] = {}
        self._target_cache = target
        self.num_written = self.num_present = 0

    def copy_shared_texts(self) -> None:
        """Copies the texts that samples share, and learns where they lie now."""
        by_shard: dict[str, list[Row]] = {}
        for row in self._inventory.shared_texts.to_pylist():
            by_shard.setdefault(row["text"]["shard"], []).append(row)
        for shard, rows in sorted(by_shard.items()):
            self._copy(shard, rows.copy)
        for stream in self._inventory.live.texts:
            for identity, place in self._target_cache.shared_texts(stream).items():
                self._shared[stream, identity] = place

    def copy_samples(self) -> None:
        """Copies latents, with the texts that lie beside them."""
        by_shard = self._inventory.positions_by_shard(self._inventory.latent_shard)
        for shard, positions in sorted(by_shard.items()):
            self._copy(shard, partial(self._sample_rows, shard, positions))

    def copy_texts(self) -> None:
        """Copies the shards with texts alone that lie over older ones."""
        inventory = self._inventory
        for stream, codes in inventory.text_shard.items():
            for shard, positions in sorted(inventory.positions_by_shard(codes).items()):
                apart = positions[codes[positions] != inventory.latent_shard[positions]]
                if len(apart) and not inventory.is_shared(shard):
                    self._copy(shard, partial(self._text_rows, apart, stream))

    def _sample_rows(self, shard: str, positions: Rows) -> list[Row]:
        rows: list[Row] = self._reader.read(positions).to_pylist()
        for row in rows:
            for stream in self._inventory.live.texts:
                text = row.get(stream)
                if text is None:
                    continue
                captions = text["captions"]
                if all(self._inventory.is_shared(caption["shard"]) for caption in captions):
                    text["captions"] = [self._shared_place(stream, caption) for caption in captions]
                elif any(caption["shard"] != shard for caption in captions):
                    row[stream] = None  # Its own shard brings it, see copy_texts.
        return rows

    def _shared_place(self, stream: str, caption: Place) -> Place:
        place = self._shared[stream, caption["id"]]
        moved = {name: value for name, value in place.items() if name in caption}
        return {**moved, "id": caption["id"], "caption": caption["caption"]}

    def _text_rows(self, positions: Rows, stream: str) -> list[Row]:
        rows: list[Row] = self._reader.read(positions).select(["sample", stream]).to_pylist()
        return rows

    def _copy(self, shard: str, make_rows: Callable[[], list[Row]]) -> None:
        record = self._inventory.records.get(shard)
        if record is None:
            raise InputError(f"{self._source.url}/{shard}: rows name it, no fragment does: run preprocess.verify")
        if self._target.size(fragment_path(record.id)) is not None:
            self.num_present += 1
            return
        copied, table = copy_shard(
            self._source,
            self._target,
            make_rows(),
            into=record,
            container=self._container,
            is_copied=lambda name: name == shard,
        )
        created = commit_rows(self._target, record.id, table, copied.fragment_record())
        if not created and read_record(self._target, record.id)["shard"] != copied.shard:
            self._target.delete(copied.shard)
        self.num_written += created
        self.num_present += not created


def _open_target(source: Cache, url: str, provenance: Provenance) -> Cache:
    """Returns the cache to fill: empty, or with what an earlier run brought."""
    target = Cache.open_or_create(url, provenance)
    if target.url == source.url:
        raise InputError(f"{url}: source and target are the same cache: name another folder for the target")
    for folder in (layout.NULL_FOLDER, layout.LEDGER_FOLDER):
        theirs = {entry.path for entry in source.store.list(folder)}
        foreign = next((entry.path for entry in target.store.list(folder) if entry.path not in theirs), None)
        if foreign is not None:
            raise InputError(
                f"{url}: found {foreign}, which {source.url} has not: expected an empty folder, or one that "
                "a conversion of the same cache began to fill"
            )
    return target


def _copy_removals(target: Cache, removed: pa.Table) -> None:
    """Keeps at which generation samples were removed, so that encoded again they get a higher one."""
    if removed.num_rows == 0:
        return
    removed = removed.sort_by("sample")
    members = (f"{row['sample']}@{row['removed']}" for batch in removed.to_batches() for row in batch.to_pylist())
    commit_rows(target.store, shard_id(members, streams=["removed"]), removed, {"kind": "removal"})


def _with_codecs(source: Cache, inventory: Inventory) -> Provenance:
    """Returns the provenance with the codecs that version 1 did not keep there, taken from the rows.

    Raises:
        InputError: if a stream's rows are in several: new samples could not tell which one to use.
    """
    provenance = {stream: dict(entry) for stream, entry in source.provenance.items()}
    unknown = [stream for stream, entry in provenance.items() if entry.get("codec", ...) is None]
    for stream in unknown:
        field = f"{stream}.captions.list.element.codec" if layout.is_text(stream) else f"{stream}.codec"
        reader = RowReader(source.store, inventory.live, ["sample", field])
        counts: dict[str, int] = {}
        for positions in chunks(len(inventory.live)):
            for entry in pc.value_counts(_codecs(reader.read(positions), stream)).to_pylist():
                counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
        if len(counts) > 1:
            found = ", ".join(f"{count:,} in {codec}" for codec, count in sorted(counts.items()))
            raise InputError(
                f"{source.url}: stream {stream!r} has arrays in several codecs ({found}): version 2 has one a stream: "
                "encode these clips into a new cache"
            )
        if not counts:
            raise InputError(f"{source.url}: stream {stream!r} has nothing to convert: encode into a new cache")
        provenance[stream]["codec"] = next(iter(counts))
    return provenance


def _codecs(table: pa.Table, stream: str) -> pa.Array:
    column = table[stream].combine_chunks()
    if layout.is_text(stream):
        column = pc.struct_field(column, "captions").flatten()
    return pc.struct_field(column, "codec")
