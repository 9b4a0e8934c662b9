"""Sweeping a cache: what no reader needs is deleted, nothing that any reader or job may be using.

Whoever opened the cache within the limit reads a snapshot that was the newest one at that time, and what it does not
cover. So the *base* is the newest snapshot that is older than the limit; it and all later ones stay with what they
name, and so do the fragments that the base does not cover and the shards that these name. All else goes, if it is
older than the limit itself: a running job's shard may be waiting for its fragment.

Before anything is deleted, what the snapshots name is looked for: where it is missing, old files may be all that is
there to mend the cache with. Deleted are first old snapshots, then covered fragments, then parts, then shards: what is
left after a crash is a cache with less to sweep. Before some hundred shards of a folder go it is listed again, since a
job that encodes a killed job's shard once more gives it the same name.
"""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.cache.fragments import find_snapshots, read_covers, read_parts, scan_fragment
from shared.cache.snapshot import read_shards, snapshot_number
from shared.errors import InputError
from shared.stores.store import Entry, Store
from shared.wording import counted

_AT_ONCE = 16
_SHARDS_A_LISTING = 256
_KINDS = {
    "old snapshots": "old snapshot",
    "covered fragments": "covered fragment",
    "files of snapshots": "file of snapshots",
    "shards": "shard",
    "leftovers": "leftover",
}
"""Several and one, in the order in which they are deleted."""
_AGE = re.compile(r"([0-9]+)([mhd])")
_SHARD = re.compile(rf"{layout.SHARD_FOLDER}/[^/]+/[0-9a-f]{{32}}-[0-9a-f]{{16}}(\.tar|\.zarr\.zip)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """What was deleted, or would be."""

    files: dict[str, tuple[int, int]]
    """By kind: number of files and bytes."""
    is_dry_run: bool

    def __str__(self) -> str:
        verb = "would delete" if self.is_dry_run else "deleted"
        parts = [
            f"{counted(count, _KINDS[kind], kind)} ({counted(num_bytes, 'byte')})"
            for kind, (count, num_bytes) in self.files.items()
            if count
        ]
        return f"{verb} {', '.join(parts)}" if parts else "nothing to delete"


def parse_age(text: str) -> timedelta:
    """Returns an age such as ``90m``, ``24h`` or ``7d``.

    Raises:
        InputError: if it is none.
    """
    match = _AGE.fullmatch(text)
    if match is None:
        raise InputError(f"--older-than {text}: expected a number and m, h or d, such as 24h")
    number, unit = match.groups()
    return int(number) * {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}[unit]


def sweep(cache: Cache, older_than: timedelta, *, dry_run: bool = False) -> Swept:
    """Deletes what no reader needs. Lists the whole store.

    Args:
        cache: Opened.
        older_than: Nothing younger goes, nor what was needed by a reader that opened the cache since.
        dry_run: Delete nothing.

    Raises:
        InputError: if the index cannot be read, or something that a snapshot names is missing: nothing was deleted.
    """
    store = cache.store
    cutoff = datetime.now(UTC) - older_than
    doomed = _find_doomed(store, cutoff)
    doomed["leftovers"] = [entry for entry in store.leftovers() if entry.modified <= cutoff]
    if not dry_run:
        for kind in _KINDS:
            if kind == "shards":
                doomed[kind] = _delete_shards(store, doomed[kind], cutoff)
            else:
                _delete(store, doomed[kind])
    return Swept(
        files={kind: (len(doomed[kind]), sum(entry.num_bytes for entry in doomed[kind])) for kind in _KINDS},
        is_dry_run=dry_run,
    )


def _find_doomed(store: Store, cutoff: datetime) -> dict[str, list[Entry]]:
    # Shards are listed before the index: what was committed meanwhile is named by it.
    entries = {entry.path: entry for entry in store.list()}
    snapshots = find_snapshots(store)
    entries.update((entry.path, entry) for entry in store.list(layout.SNAPSHOT_FOLDER))
    base = max((path for path in snapshots if entries[path].modified <= cutoff), default=None, key=snapshot_number)
    kept = [path for path in snapshots if base is None or snapshot_number(path) >= snapshot_number(base)]
    # A repair covers less than the snapshot that it mended.
    covers = set.intersection(*(set(read_covers(store, path)) for path in kept)) if base else set()
    parts = {part for path in kept for part in read_parts(store, path)}
    shards = {record.shard: record.num_bytes for path in kept for record in read_shards(store, path)}
    for path in sorted(parts | shards.keys()):
        if path not in entries or entries[path].num_bytes != shards.get(path, entries[path].num_bytes):
            raise InputError(
                f"{store.url}/{path}: missing or of another size than the newest snapshots say: nothing was deleted: "
                "run preprocess.verify"
            )
    fragments = [entry.path for entry in store.list(layout.INDEX_FOLDER) if entry.path.endswith(".parquet")]
    needed = {*shards, *_shards_of_fragments(store, [path for path in fragments if path not in covers])}
    old = [entry for entry in entries.values() if entry.modified <= cutoff]
    of_index, replaced = {*snapshots, *parts}, set(snapshots) - set(kept)
    return {
        "old snapshots": [entry for entry in old if entry.path in replaced],
        "covered fragments": [entry for entry in old if entry.path in covers],
        "files of snapshots": [
            entry for entry in old if entry.path.startswith(f"{layout.SNAPSHOT_FOLDER}/") and entry.path not in of_index
        ],
        "shards": [entry for entry in old if _SHARD.match(entry.path) and entry.path not in needed],
    }


def _shards_of_fragments(store: Store, paths: Sequence[str]) -> set[str]:
    """Returns the shards that fragments record or that their rows name, which other shards of texts may be among."""

    def named(path: str) -> set[str]:
        fragment = scan_fragment(store, path, ["sample"])
        fields = [name for name in fragment.schema.names if name == "text" or layout.is_text(name)]
        table = scan_fragment(store, path, ["sample", *fields]).table if fields else fragment.table
        found = {fragment.record["shard"]} if "shard" in fragment.record else set()
        for field in fields:
            column = table[field].combine_chunks()
            places = column if field == "text" else column.field("captions").flatten()
            found.update(places.field("shard").unique().drop_null().to_pylist())
        return found

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return set().union(*pool.map(named, paths))


def _delete_shards(store: Store, shards: Sequence[Entry], cutoff: datetime) -> list[Entry]:
    """Deletes shards that are still as old as they were, and that nothing names yet; returns those."""
    deleted: list[Entry] = []
    for folder in sorted({entry.path.rpartition("/")[0] for entry in shards}):
        within = [entry for entry in shards if entry.path.rpartition("/")[0] == folder]
        for start in range(0, len(within), _SHARDS_A_LISTING):
            old = {entry.path for entry in store.list(folder) if entry.modified <= cutoff}
            still = [entry for entry in within[start : start + _SHARDS_A_LISTING] if entry.path in old]
            _delete(store, still)
            deleted.extend(still)
    return deleted


def _delete(store: Store, entries: Iterable[Entry]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda entry: store.delete(entry.path), entries))
