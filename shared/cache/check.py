"""Checking a cache against its index, byte for byte. No models, nothing is changed."""

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from shared.cache import layout
from shared.cache.check_index import (
    IndexReport,
    check_index,
    expected_of_fragment,
    expected_of_part,
    expected_of_references,
)
from shared.cache.check_shard import check_shard
from shared.cache.dataset import Cache
from shared.cache.expectation import ExpectedShard
from shared.cache.finding import Finding, note
from shared.cache.fragments import read_table
from shared.cache.null_caption import read_null_caption
from shared.errors import InputError
from shared.stores.store import Store, StoreError


@dataclass(kw_only=True, slots=True)
class Totals:
    """What a check has read; complete when its findings have been taken."""

    num_samples: int = 0
    num_shards: int = 0
    """That hold what counts."""
    num_read: int = 0
    """Shards that were read."""
    read_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Which shards to read: some, chosen by chance from a seed."""

    fraction: float | None = None
    num_shards: int | None = None
    """Used where there is no fraction."""
    seed: int = 0

    def choose(self, shards: list[str]) -> set[str]:
        """Returns the shards to read: at least one unless none is asked for; the same ones for the same seed."""
        if self.fraction is not None:
            count = max(1, round(self.fraction * len(shards))) if self.fraction > 0 else 0
        else:
            count = len(shards) if self.num_shards is None else self.num_shards
        if count >= len(shards):
            return set(shards)
        return set(random.Random(self.seed).sample(sorted(shards), count))


ALL = Part()
NONE = Part(fraction=0.0)


def check_files(
    cache: Cache, *, part: Part = ALL, num_workers: int = 1, totals: Totals | None = None
) -> Iterator[Finding]:
    """Yields what is wrong with a cache's files.

    The index is read whole, and the store is listed once; every shard that holds what counts must be there in its
    size, and those of ``part`` are read whole, once. At most ``2 * num_workers`` shards are in memory.

    Args:
        cache: What to check.
        part: Which shards to read.
        num_workers: Shards that are checked at once.
        totals: Filled with what was read.
    """
    totals = totals if totals is not None else Totals()
    store = cache.store
    report = check_index(store, cache.provenance)
    yield from report.findings
    totals.num_samples = report.num_samples
    yield from _null_captions(cache)
    yield from _ledger(store)
    sizes = {entry.path: entry.num_bytes for entry in store.list(layout.SHARD_FOLDER)}
    totals.num_shards = len(report.live_shards)
    missing = [shard for shard in sorted(report.live_shards) if shard not in sizes]
    for shard in missing:
        what = f"the shard is missing: {report.known_shards[shard]} names it"
        yield Finding(path=shard, what=what, remedy="encode again")
    present = report.live_shards - set(missing)
    chosen = part.choose(sorted(present))
    for shard in sorted(present - chosen):
        record = report.records.get(shard)
        if record is not None and sizes[shard] != record.num_bytes:
            what = f"{sizes[shard]} bytes: expected {record.num_bytes}"
            yield Finding(path=shard, what=what, remedy="encode again")
    yield from _check_shards(store, report, chosen, num_workers, totals)
    yield from _unseen(store, report, sizes)


def _check_shards(
    store: Store, report: IndexReport, chosen: set[str], num_workers: int, totals: Totals
) -> Iterator[Finding]:
    """Checks shards on threads: hashing, decompressing and reading leave Python's lock to others."""

    def check(expected: ExpectedShard) -> tuple[list[Finding], int]:
        try:
            data = store.read(expected.shard)
        except (FileNotFoundError, StoreError) as error:
            what = f"not readable: {error}"
            return [Finding(path=expected.shard, what=what, remedy="encode again")], 0
        return list(check_shard(expected, data)), len(data)

    waiting: deque[Future[tuple[list[Finding], int]]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        for expected in _expectations(store, report, chosen):
            waiting.append(pool.submit(check, expected))
            while len(waiting) > 2 * num_workers:
                yield from _take(waiting, totals)
        while waiting:
            yield from _take(waiting, totals)


def _take(waiting: deque[Future[tuple[list[Finding], int]]], totals: Totals) -> Iterator[Finding]:
    findings, num_bytes = waiting.popleft().result()
    totals.num_read += 1
    totals.read_bytes += num_bytes
    yield from findings


def _expectations(store: Store, report: IndexReport, chosen: set[str]) -> Iterator[ExpectedShard]:
    seen = set()
    for path in report.fragments:
        expected = expected_of_fragment(store, path, report)
        if expected.shard in chosen and expected.shard not in seen:
            seen.add(expected.shard)
            yield expected
    for path in report.parts:
        for expected in expected_of_part(store, path, report):
            if expected.shard in chosen:
                seen.add(expected.shard)
                yield expected
    for shard in sorted(chosen - seen):
        yield expected_of_references(report, shard)


def _null_captions(cache: Cache) -> Iterator[Finding]:
    for stream, about in cache.provenance.items():
        if not layout.is_text(stream):
            continue
        path = f"{layout.NULL_FOLDER}/{stream}.safetensors"
        try:
            embedding = read_null_caption(cache.store, stream)
        except InputError as error:
            yield Finding(path=path, what=str(error).removeprefix(f"{cache.url}/{path}: "), remedy="set aside")
            continue
        if embedding is None:
            if cache.version != 1:
                yield note(path, "no embedding of the empty caption yet: the next job writes it")
            continue
        channels = about.get("text_channels")
        if embedding.ndim != 2 or channels not in (None, embedding.shape[1]) or not len(embedding):
            what = f"shape {tuple(embedding.shape)}: expected (tokens, {channels})"
            yield Finding(path=path, what=what, remedy="set aside")
        elif not bool(torch.isfinite(embedding.float()).all()):
            yield Finding(path=path, what="values that are not finite", remedy="set aside")


def _ledger(store: Store) -> Iterator[Finding]:
    for entry in store.list(layout.LEDGER_FOLDER):
        if not entry.path.endswith(".parquet"):
            continue
        try:
            read_table(store, entry.path)
        except InputError as error:
            what = str(error).removeprefix(f"{store.url}/{entry.path}: ").removesuffix(": run preprocess.verify")
            yield Finding(path=entry.path, what=what, remedy="set aside")


def _unseen(store: Store, report: IndexReport, sizes: dict[str, int]) -> Iterator[Finding]:
    for shard in sorted(sizes.keys() - report.live_shards):
        if shard in report.known_shards:
            yield note(shard, "superseded or removed: nothing in it counts; shared.cache gc removes it")
        else:
            yield note(shard, "no fragment names this shard; no reader sees it; shared.cache gc removes it")
    for entry in store.leftovers():
        yield note(entry.path, "left by a writer that died or is at work; no reader sees it")
