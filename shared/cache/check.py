"""Checking a cache against its index, byte for byte. Pure over files: no models, nothing is changed."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow.parquet as pq

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.storage import TEMPORARY_PREFIX


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that is not as the index says."""

    path: str
    """Below the cache's folder."""
    what: str
    """What was found, what was expected."""
    is_fault: bool
    """False for leftovers that no reader sees."""


def check_files(cache: Cache) -> Iterator[Finding]:
    """Yields what is wrong with a cache's files. Reads every committed byte once."""
    named: set[str] = set()
    seen: dict[str, str] = {}
    for fragment in cache.fragments():
        yield from _check_fragment(cache.root, fragment, named, seen)
    yield from _leftovers(cache.root, named)


def _check_fragment(root: Path, fragment: Path, named: set[str], seen: dict[str, str]) -> Iterator[Finding]:
    place = f"{layout.INDEX_FOLDER}/{fragment.name}"
    try:
        file = pq.ParquetFile(fragment)
        rows = file.read().to_pylist()
        record = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
        shard, expected_bytes, expected_hash = record["shard"], int(record["shard_bytes"]), record["shard_sha256"]
        shards_of_rows = {row[stream]["shard"] for row in rows for stream in layout.STREAMS}
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are OSError or ValueError
        yield Finding(path=place, what=f"not readable as a fragment: {error}", is_fault=True)
        return
    named.add(shard)
    for row in rows:
        if (first := seen.setdefault(row["sample"], place)) != place:
            yield Finding(path=place, what=f"sample {row['sample']} is also in {first}, which counts", is_fault=False)
    if shards_of_rows != {shard}:
        yield Finding(path=place, what=f"rows name {sorted(shards_of_rows)}: expected only {shard}", is_fault=True)
        return
    try:
        data = (root / shard).read_bytes()
    except OSError as error:
        yield Finding(path=shard, what=f"the shard of {place} is not readable: {error.strerror}", is_fault=True)
        return
    if len(data) != expected_bytes:
        yield Finding(path=shard, what=f"{len(data)} bytes: expected {expected_bytes}", is_fault=True)
    elif (found := sha256(data).hexdigest()) != expected_hash:
        yield Finding(path=shard, what=f"SHA-256 {found[:16]}...: expected {expected_hash[:16]}...", is_fault=True)
    yield from _check_payloads(shard, data, rows)
    yield from _check_members(shard, data, rows)


def _check_payloads(shard: str, data: bytes, rows: list[dict[str, Any]]) -> Iterator[Finding]:
    for row in rows:
        for stream in layout.STREAMS:
            entry = row[stream]
            payload = data[entry["offset"] : entry["offset"] + entry["bytes"]]
            if google_crc32c.value(payload) != entry["crc32c"]:
                what = f"{stream} of sample {row['sample']} at offset {entry['offset']}: checksum differs"
                yield Finding(path=shard, what=what, is_fault=True)


def _check_members(shard: str, data: bytes, rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Compares the archive as any tar reader sees it with the index."""
    expected = {f"{row['sample']}.{extension}" for row in rows for extension in (*layout.STREAMS, "json")}
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {member.name: member for member in tar}
    except (tarfile.TarError, EOFError) as error:
        yield Finding(path=shard, what=f"not readable as tar: {error}", is_fault=True)
        return
    if members.keys() != expected:
        yield Finding(
            path=shard,
            what=f"{len(members.keys() & expected)} of {len(expected)} members, and {len(members.keys() - expected)} "
            "that the index does not know",
            is_fault=True,
        )
    for row in rows:
        for stream in layout.STREAMS:
            member = members.get(f"{row['sample']}.{stream}")
            place = (row[stream]["offset"], row[stream]["bytes"])
            if member is not None and (member.offset_data, member.size) != place:
                what = f"{member.name} lies at {member.offset_data}, {member.size} bytes: the index says {place}"
                yield Finding(path=shard, what=what, is_fault=True)


def _leftovers(root: Path, named: set[str]) -> Iterator[Finding]:
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root).as_posix()
        if path.name.startswith(TEMPORARY_PREFIX):
            yield Finding(path=place, what="left by a writer that died; no reader sees it", is_fault=False)
        elif path.is_file() and place.startswith(f"{layout.SHARD_FOLDER}/") and place not in named:
            yield Finding(path=place, what="no fragment names this shard; no reader sees it", is_fault=False)
