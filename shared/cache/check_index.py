"""Checking the index: every fragment, what it says of its rows, and which shards the rows that count name."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import layout
from shared.cache.dataset import Provenance
from shared.cache.expectation import ExpectedShard, Payload, home_of, key_of, members_in, payload_of, row_streams
from shared.cache.finding import Finding, note
from shared.cache.fragments import Record, find_files, read_fragment, read_record, read_rows
from shared.cache.resolve import resolve
from shared.cache.row_faults import row_faults
from shared.cache.rows import Row, places
from shared.cache.schema import REMOVED, SHARED
from shared.errors import InputError
from shared.spec import Bucket
from shared.stores.store import Store

_IDENTITY = re.compile(r"[0-9a-f]{32}")
_READERS = 16
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexReport:
    """What the index says, and what is wrong with it."""

    findings: tuple[Finding, ...]
    fragments: tuple[str, ...]
    """Paths of the readable fragments that have a shard and are not covered by the snapshot."""
    snapshot: str | None
    num_samples: int
    """That count."""
    live_shards: frozenset[str]
    """Shards that rows that count, or texts that samples share, name."""
    known_shards: dict[str, str] = field(default_factory=dict)
    """Every shard that some row names, live or not, and a file of the index that does."""
    shard_bytes: dict[str, int] = field(default_factory=dict)
    """The recorded sizes."""
    referred: dict[str, frozenset[Payload]] = field(default_factory=dict)
    """By shard, the texts in it that rows of other shards name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What one file of the index says."""

    path: str
    findings: tuple[Finding, ...]
    is_readable: bool
    shard: str | None = None
    shard_bytes: int = 0
    is_shared: bool = False
    named: frozenset[str] = frozenset()
    streams: frozenset[str] = frozenset()
    samples: tuple[str, ...] = ()
    referred: tuple[tuple[str, Payload], ...] = ()


def check_index(store: Store, provenance: Provenance) -> IndexReport:
    """Reads the whole index. The shards are not looked at.

    Args:
        store: The cache's.
        provenance: Of its streams; empty if it is not known.
    """
    findings: list[Finding] = []
    snapshot, fragments = _files(store, findings)
    paths = [*([snapshot] if snapshot else []), *fragments]
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(lambda path: _check_part(store, path, provenance, path == snapshot), paths))
    findings.extend(finding for part in parts for finding in part.findings)
    readable = [part for part in parts if part.is_readable]
    known: dict[str, str] = {}
    referred: dict[str, set[Payload]] = {}
    for part in reversed(readable):
        known.update((shard, part.path) for shard in part.named)
        for shard, payload in part.referred:
            referred.setdefault(shard, set()).add(payload)
    for part in readable:
        if part.shard is not None:
            known[part.shard] = part.path
    streams = frozenset[str]().union(*(part.streams for part in readable))
    live, num_samples = _live_shards(store, [part.path for part in readable], streams)
    live.update(part.shard for part in readable if part.is_shared and part.shard)
    findings.extend(_twice(readable))
    return IndexReport(
        findings=tuple(findings),
        fragments=tuple(part.path for part in readable if part.shard is not None),
        snapshot=snapshot if any(part.path == snapshot for part in readable) else None,
        num_samples=num_samples,
        live_shards=frozenset(live),
        known_shards=known,
        shard_bytes={part.shard: part.shard_bytes for part in readable if part.shard is not None},
        referred={shard: frozenset(payloads) for shard, payloads in referred.items()},
    )


def _files(store: Store, findings: list[Finding]) -> tuple[str | None, list[str]]:
    """Returns the snapshot and the fragments that readers read, whatever state they are in."""
    try:
        files = find_files(store)
    except InputError as error:
        snapshots = [entry.path for entry in store.list(layout.SNAPSHOT_FOLDER) if entry.path.endswith(".parquet")]
        findings.append(Finding(path=max(snapshots), what=_unreadable(store, error), remedy="set aside"))
        return None, [entry.path for entry in store.list(layout.INDEX_FOLDER) if entry.path.endswith(".parquet")]
    return files.snapshot, list(files.fragments)


def _unreadable(store: Store, error: Exception) -> str:
    text = " ".join(str(error).split()).removesuffix(": run preprocess.verify")
    return text.split(".parquet: ", 1)[-1].removeprefix(f"{store.url}/")


def _check_part(store: Store, path: str, provenance: Provenance, is_snapshot: bool) -> _Part:
    try:
        table, record = read_fragment(store, path), read_record(store, path)
    except InputError as error:
        what = f"not readable as a fragment: {_unreadable(store, error)}"
        return _Part(path=path, findings=(Finding(path=path, what=what, remedy="set aside"),), is_readable=False)
    try:
        return _examine(path, table, record, provenance, is_snapshot)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"its rows are not as the format says ({type(error).__name__}: {error})"
        return _Part(path=path, findings=(Finding(path=path, what=what, remedy="set aside"),), is_readable=False)


def _examine(path: str, table: pa.Table, record: Record, provenance: Provenance, is_snapshot: bool) -> _Part:
    faults: dict[str, None] = {}
    shard = None if is_snapshot else record.get("shard")
    named: set[str] = set()
    referred: dict[tuple[str, Payload], None] = {}
    samples: list[str] = []
    if REMOVED.name in table.column_names and shard is None and len(table.column_names) == 2:
        return _Part(path=path, findings=(), is_readable=True)
    stream = shared_stream(record)
    for row in _rows(table):
        if not _IDENTITY.fullmatch(key_of(row)):
            raise ValueError(f"{key_of(row)!r} is no identity: expected 32 hex digits")
        home = home_of(row, stream) if is_snapshot else shard
        faults.update((what, None) for what in row_faults(row, provenance, stream))
        for name in row_streams(row, stream):
            for place in places(row, name):
                named.add(place["shard"])
                if place["shard"] != home:
                    if not layout.is_text(name):
                        faults[f"rows name {place['shard']}: expected only {home}"] = None
                    referred[place["shard"], payload_of(row, name, place)] = None
        if row.get(layout.LATENT_STREAM) is not None:
            samples.append(row["sample"])
            folder = Bucket(row["num_frames"], row["height"], row["width"])
            if home is not None and not home.startswith(f"{layout.SHARD_FOLDER}/{folder}/"):
                faults[f"sample {row['sample']} has bucket {folder}: its shard is {home}"] = None
    if shard is not None:
        name = path.rpartition("/")[2].removesuffix(".parquet")
        if not shard.rpartition("/")[2].startswith(f"{name}-") or len(record["shard_sha256"]) != 64:
            faults[f"it names the shard {shard}: expected one of its own name {name}"] = None
    return _Part(
        path=path,
        findings=tuple(Finding(path=path, what=what, remedy="set aside") for what in list(faults)[:5]),
        is_readable=True,
        shard=shard,
        shard_bytes=int(record["shard_bytes"]) if shard is not None else 0,
        is_shared=SHARED in table.column_names,
        named=frozenset(named),
        streams=frozenset(name for name in table.column_names if layout.is_text(name)),
        samples=tuple(samples),
        referred=tuple(referred),
    )


def shared_stream(record: Record) -> str:
    """Returns the stream of the texts that a fragment's shard shares, by the shard's folder."""
    parts = str(record.get("shard", "")).split("/")
    return parts[1] if len(parts) == 3 else layout.TEXT_STREAM


def _rows(table: pa.Table) -> Iterator[Row]:
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        yield from table.slice(start, _ROWS_AT_ONCE).to_pylist()


def _live_shards(store: Store, paths: Sequence[str], streams: frozenset[str]) -> tuple[set[str], int]:
    columns = ["sample", REMOVED.name, "latent.generation", "latent.shard"]
    for stream in sorted(streams):
        columns += [f"{stream}.generation", f"{stream}.captions.list.element.shard"]
    table = resolve(read_rows(store, paths, columns))
    live: set[str] = set()
    for name in table.column_names:
        column = table[name]
        if layout.is_text(name):
            captions = pc.list_flatten(pc.struct_field(column, "captions"))
            live.update(pc.unique(pc.struct_field(captions, "shard")).to_pylist())
        elif name == layout.LATENT_STREAM:
            live.update(pc.unique(pc.struct_field(column, "shard")).to_pylist())
    return live - {None}, table.num_rows


def _twice(parts: Sequence[_Part]) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for part in parts:
        again = [sample for sample in part.samples if seen.setdefault(sample, part.path) != part.path]
        if again:
            first = seen[again[0]]
            yield note(
                part.path, f"{len(again)} of its samples are also in other fragments, e.g. {again[0]} in {first}"
            )


def expected_of_fragment(store: Store, path: str, report: IndexReport) -> ExpectedShard:
    """Returns what a fragment that has a shard says of it."""
    rows, record = read_fragment(store, path).to_pylist(), read_record(store, path)
    shard, stream = record["shard"], shared_stream(record)
    return ExpectedShard(
        shard=shard,
        index_path=path,
        keys=tuple(key_of(row) for row in rows),
        members=members_in(rows, shard, stream),
        is_whole=True,
        num_bytes=int(record["shard_bytes"]),
        sha256=record["shard_sha256"],
        referred=report.referred.get(shard, frozenset()),
    )


def expected_of_snapshot(store: Store, path: str, report: IndexReport) -> Iterator[ExpectedShard]:
    """Yields what a snapshot says of each shard, those of fragments that it does not cover left out."""
    table = read_fragment(store, path)
    for shard, rows in groupby(_rows(table), key=lambda row: home_of(row, layout.TEXT_STREAM)):
        if shard is None or shard in report.shard_bytes:
            continue
        kept = list(rows)
        yield ExpectedShard(
            shard=shard,
            index_path=path,
            keys=tuple(key_of(row) for row in kept),
            members=members_in(kept, shard, layout.TEXT_STREAM),
            is_whole=False,
            referred=report.referred.get(shard, frozenset()),
        )
