"""Checking the index: every fragment, what it says of its rows, and which shards the rows that count name."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import layout
from shared.cache.dataset import Provenance
from shared.cache.expectation import ExpectedShard, Payload, home_of, key_of, members_in, payload_of, row_streams
from shared.cache.finding import Finding, note
from shared.cache.fragments import IndexFiles, Record, find_files, find_snapshots, read_fragment, read_record, read_rows
from shared.cache.resolve import resolve
from shared.cache.row_faults import row_faults
from shared.cache.rows import Row, places
from shared.cache.schema import REMOVED, SHARED
from shared.cache.snapshot import ShardRecord, read_shards
from shared.errors import InputError
from shared.spec import Bucket
from shared.stores.store import Store

_IDENTITY = re.compile(r"[0-9a-f]{32}")
_READERS = 16
_MOST_NAMED = 5
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexReport:
    """What the index says, and what is wrong with it."""

    findings: tuple[Finding, ...]
    fragments: tuple[str, ...]
    """Paths of the readable fragments that have a shard and that no snapshot covers."""
    parts: tuple[str, ...]
    """Paths of the readable files with the newest snapshot's rows."""
    num_samples: int
    """That count."""
    live_shards: frozenset[str]
    """Shards that rows that count, or texts that samples share, name."""
    known_shards: dict[str, str]
    """Every shard that some row names, live or not, and a file of the index that does."""
    records: dict[str, ShardRecord]
    """What fragments and snapshot recorded of shards."""
    referred: dict[str, frozenset[Payload]]
    """By shard, the texts in it that rows of other shards name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What one file of the index says."""

    path: str
    findings: tuple[Finding, ...] = ()
    is_readable: bool = True
    record: ShardRecord | None = None
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
    files, records = _files(store, findings)
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(lambda path: _check_part(store, path, provenance), files.paths()))
    findings.extend(finding for part in parts for finding in part.findings)
    readable = [part for part in parts if part.is_readable]
    known: dict[str, str] = {}
    referred: dict[str, set[Payload]] = {}
    for part in reversed(readable):
        known.update((shard, part.path) for shard in part.named)
        for shard, payload in part.referred:
            referred.setdefault(shard, set()).add(payload)
    for part in readable:
        if part.record is not None:
            known[part.record.shard] = part.path
            records[part.record.shard] = part.record
    live, num_samples = _live_shards(store, readable)
    findings.extend(_twice([part for part in readable if part.path in files.fragments]))
    return IndexReport(
        findings=tuple(findings),
        fragments=tuple(part.path for part in readable if part.record is not None),
        parts=tuple(part.path for part in readable if part.path in files.parts),
        num_samples=num_samples,
        live_shards=frozenset(live),
        known_shards=known,
        records=records,
        referred={shard: frozenset(payloads) for shard, payloads in referred.items()},
    )


def _files(store: Store, findings: list[Finding]) -> tuple[IndexFiles, dict[str, ShardRecord]]:
    """Returns the files that readers read, whatever state they are in, and what the snapshot records of shards."""
    try:
        files = find_files(store)
        if files.snapshot is None:
            return files, {}
        return files, {record.shard: record for record in read_shards(store, files.snapshot)}
    except (InputError, KeyError, ValueError) as error:
        path = find_snapshots(store)[-1]
        what = f"{_unreadable(error)}; without it, earlier snapshots and fragments count as far as they are there"
        findings.append(Finding(path=path, what=what, remedy="set aside"))
        fragments = [entry.path for entry in store.list(layout.INDEX_FOLDER) if entry.path.endswith(".parquet")]
        return IndexFiles(snapshot=None, fragments=tuple(fragments)), {}


def _unreadable(error: Exception) -> str:
    text = " ".join(str(error).split()).removesuffix(": run preprocess.verify")
    return text.split(".parquet: ", 1)[-1]


def _check_part(store: Store, path: str, provenance: Provenance) -> _Part:
    try:
        return _examine(path, read_fragment(store, path), read_record(store, path), provenance)
    except FileNotFoundError:
        what = "the file is missing: the newest snapshot names it"
    except InputError as error:
        what = f"not readable as a fragment: {_unreadable(error)}"
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"its rows are not as the format says ({type(error).__name__}: {error})"
    return _Part(path=path, findings=(Finding(path=path, what=what, remedy="set aside"),), is_readable=False)


def _examine(path: str, table: pa.Table, record: Record, provenance: Provenance) -> _Part:
    """Looks at every row of a file.

    Raises:
        KeyError, IndexError, TypeError, ValueError, AttributeError: if a row lacks something.
    """
    faults: dict[str, None] = {}
    shard = ShardRecord.of_fragment(record)
    named: set[str] = set()
    referred: dict[tuple[str, Payload], None] = {}
    samples: list[str] = []
    for row in _rows(table):
        if not _IDENTITY.fullmatch(key_of(row)):
            raise ValueError(f"{key_of(row)!r} is no identity: expected 32 hex digits")
        home = home_of(row) if shard is None else shard.shard
        faults.update((what, None) for what in row_faults(row, provenance))
        for name in row_streams(row):
            for place in places(row, name):
                named.add(place["shard"])
                if place["shard"] != home:
                    referred[place["shard"], payload_of(row, name, place)] = None
                    if not layout.is_text(name):
                        faults[f"rows name {place['shard']}: expected only {home}"] = None
        if row.get(layout.LATENT_STREAM) is not None:
            samples.append(row["sample"])
            bucket = Bucket(row["num_frames"], row["height"], row["width"])
            if home is not None and not home.startswith(f"{layout.SHARD_FOLDER}/{bucket}/"):
                faults[f"sample {row['sample']} has bucket {bucket}: its shard is {home}"] = None
    if shard is not None:
        name = path.rpartition("/")[2].removesuffix(".parquet")
        if shard.id != name or len(shard.sha256) != 64 or shard.num_bytes < 0:
            faults[f"it names the shard {shard.shard}: expected one of its own name {name}"] = None
    is_shared = SHARED in table.column_names
    return _Part(
        path=path,
        findings=tuple(Finding(path=path, what=what, remedy="set aside") for what in list(faults)[:_MOST_NAMED]),
        record=shard,
        is_shared=is_shared,
        named=frozenset(named),
        streams=frozenset() if is_shared else frozenset(name for name in table.column_names if layout.is_text(name)),
        samples=tuple(samples),
        referred=tuple(referred),
    )


def _rows(table: pa.Table) -> Iterator[Row]:
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        yield from table.slice(start, _ROWS_AT_ONCE).to_pylist()


def _live_shards(store: Store, parts: Sequence[_Part]) -> tuple[set[str], int]:
    columns = ["sample", REMOVED.name, "latent.generation", "latent.shard"]
    for stream in sorted(frozenset[str]().union(*(part.streams for part in parts))):
        columns += [f"{stream}.generation", f"{stream}.captions.list.element.shard"]
    table = resolve(read_rows(store, [part.path for part in parts], columns))
    live: set[str] = set()
    for name in table.column_names:
        column = table[name]
        if layout.is_text(name):
            captions = pc.list_flatten(pc.struct_field(column, "captions"))
            live.update(pc.unique(pc.struct_field(captions, "shard")).to_pylist())
        elif name == layout.LATENT_STREAM:
            live.update(pc.unique(pc.struct_field(column, "shard")).to_pylist())
    for part in parts:
        if part.is_shared:
            live.update(part.named)
    return live - {None}, table.num_rows


def _twice(parts: Sequence[_Part]) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for part in parts:
        again = [sample for sample in part.samples if seen.setdefault(sample, part.path) != part.path]
        if again:
            what = f"{len(again)} of its samples are also in other fragments, e.g. {again[0]} in {seen[again[0]]}"
            yield note(part.path, what)


def expected_of_fragment(store: Store, path: str, report: IndexReport) -> ExpectedShard:
    """Returns what a fragment that has a shard says of it."""
    rows, record = read_fragment(store, path).to_pylist(), ShardRecord.of_fragment(read_record(store, path))
    assert record is not None, path
    return _expected(report, record.shard, path, rows, is_whole=True)


def expected_of_part(store: Store, path: str, report: IndexReport) -> Iterator[ExpectedShard]:
    """Yields what a part of a snapshot says of each shard, those that have a fragment of their own left out."""
    fragments = set(report.fragments)
    for shard, rows in groupby(_rows(read_fragment(store, path)), key=home_of):
        if shard is not None and report.known_shards[shard] not in fragments:
            yield _expected(report, shard, path, list(rows), is_whole=False)


def expected_of_references(report: IndexReport, shard: str) -> ExpectedShard:
    """Returns what is known of a shard that only rows of other shards name."""
    return _expected(report, shard, report.known_shards[shard], [], is_whole=False)


def _expected(report: IndexReport, shard: str, path: str, rows: Sequence[Row], *, is_whole: bool) -> ExpectedShard:
    record = report.records.get(shard)
    return ExpectedShard(
        shard=shard,
        index_path=path,
        keys=tuple(key_of(row) for row in rows),
        members=members_in(rows, shard),
        is_whole=is_whole,
        num_bytes=None if record is None else record.num_bytes,
        sha256=None if record is None else record.sha256,
        referred=report.referred.get(shard, frozenset()),
    )
