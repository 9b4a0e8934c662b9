"""Mending a snapshot: a newer one of the same rows takes its place, without what is broken."""

import secrets
from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import layout
from shared.cache.fragments import (
    SHARED_KIND,
    IndexFiles,
    fragment_path,
    read_covers,
    read_fragment,
    read_record,
)
from shared.cache.schema import SHARED, SHARED_TEXT
from shared.cache.snapshot import PartWriter, commit_snapshot, read_shards, snapshot_number
from shared.errors import InputError
from shared.stores.store import Store


def mend_snapshot(
    store: Store, files: IndexFiles, *, broken_parts: Collection[str], broken_shards: Collection[str]
) -> str | None:
    """Commits a snapshot without broken parts, and without broken shards and the texts in them that samples share.

    Where a part is lost, nothing is covered any more: fragments that are still there may have its rows, and what the
    next job makes anew has the names of those that were swept. The rows of sound parts stand before those of fragments,
    so that of equal generations they count.

    Returns:
        What was done; None if there is nothing to do.

    Raises:
        InputError: if a compaction committed a snapshot meanwhile.
    """
    if files.snapshot is None:
        return None
    shards = read_shards(store, files.snapshot)
    lost = {shard.shard: shard for shard in shards if shard.shard in broken_shards}
    parts = [path for path in files.parts if path not in broken_parts]
    covers = read_covers(store, files.snapshot)
    if len(parts) < len(files.parts):
        covers = []
    elif not lost:
        return None
    shared = {fragment_path(shard.id) for shard in lost.values() if shard.kind == SHARED_KIND}
    number = snapshot_number(files.snapshot) + 1
    writer = PartWriter(store, f"{layout.SNAPSHOT_FOLDER}/{number:06}-{secrets.token_hex(8)}", SHARED_TEXT)
    kept = [path for path in parts if not _rewritten(store, path, pa.array(list(lost), pa.string()), writer)]
    created = commit_snapshot(
        store,
        number,
        [shard for shard in shards if shard.shard not in lost],
        covers=[path for path in covers if path not in shared],
        parts=[*kept, *writer.parts],
    )
    if not created:
        raise InputError(f"{store.url}: a compaction made snapshot {number} meanwhile: run --repair again")
    done = f"{files.snapshot}: snapshot {number} takes its place, without what is broken"
    if any(path.rpartition("/")[2].startswith("removed-") for path in files.parts if path in broken_parts):
        done += "; which samples were removed is known only as far as fragments say so: others of them may come back"
    return done


def _rewritten(store: Store, path: str, lost: pa.Array, writer: PartWriter) -> bool:
    """Writes a part of shared texts anew if some of them lie in shards that are lost; returns whether it did."""
    if read_record(store, path).get("kind") != SHARED_KIND:
        return False
    table = read_fragment(store, path)
    shards = pa.chunked_array([pc.struct_field(chunk, "shard") for chunk in table[SHARED].chunks], pa.string())
    is_lost = pc.is_in(shards, value_set=lost)
    if not pc.any(is_lost).as_py():
        return False
    remaining = table.filter(pc.invert(is_lost))
    if remaining.num_rows:
        writer.write("texts", remaining.replace_schema_metadata(None), {"kind": SHARED_KIND})
    return True
