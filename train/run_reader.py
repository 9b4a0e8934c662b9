"""Fetching runs: what some samples need of the shards, in as few reads as there are stretches of it.

Payloads that lie close together are fetched by one read. From an object store that is a request; ``LocalCopies`` may
keep what it returned. From a folder it is a word to the kernel, which reads the stretch ahead; the payloads are then
copied out of the page cache, one by one, to where they are needed: every further copy of this much data would cost as
much as decoding it.
"""

import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import google_crc32c
import numpy as np

from shared.errors import InputError
from shared.stores.store import Store
from train.index_columns import Array, IndexColumns, Payloads
from train.local_copies import LocalCopies
from train.shard_files import ShardFiles

FOLDER_GAP_BYTES = 128 * 1024
"""What lies between two payloads is read along with them if it is no more than this: a disk's seek costs as much."""
OBJECT_GAP_BYTES = 1024 * 1024
"""Likewise from an object store: a request's latency costs as much."""


class DamagedError(InputError):
    """Raised for a payload that is missing or not what the index says."""

    def __init__(self, text: str, *, missing_shard: int | None = None) -> None:
        super().__init__(text)
        self.missing_shard = missing_shard
        """The shard's number, if all of it is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Bytes of a shard that are fetched by one read."""

    shard: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Fetched payloads, by their numbers in the order in which they were asked for."""

    stretches: list[Stretch]
    place: Array
    """Of each payload: its stretch."""
    offset: Array
    """Of each payload: where it begins in its stretch."""
    fetched: list[Array | None]
    """Each stretch's bytes, fewer where the shard ends; None where there is no such shard. Empty for a folder."""


def merge_payloads(payloads: Payloads, gap_bytes: int) -> tuple[list[Stretch], Array, Array]:
    """Returns the stretches that hold all payloads, and for each payload its stretch and its offset in it. Pure."""
    order = np.lexsort((payloads.offset, payloads.shard))
    shard, start = payloads.shard[order].astype(np.int64), payloads.offset[order]
    end = start + payloads.num_bytes[order]
    # Payloads may repeat (captions that samples share): how far a shard is covered so far, as one rising sequence.
    span = int(end.max()) + 1
    reach = np.maximum.accumulate(end + shard * span)
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = start[1:] + shard[1:] * span > reach[:-1] + gap_bytes
    is_new[1:] |= shard[1:] != shard[:-1]
    firsts = np.flatnonzero(is_new)
    lasts = np.append(firsts[1:], len(order)) - 1
    stretches = [
        Stretch(shard=int(s), offset=int(o), num_bytes=int(e - o))
        for s, o, e in zip(shard[firsts], start[firsts], reach[lasts] - shard[lasts] * span, strict=True)
    ]
    place, offset = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    place[order] = is_new.cumsum() - 1
    offset[order] = start - start[firsts][place[order]]
    return stretches, place, offset


class RunReader(Protocol):
    """Reads runs and checks payloads. For several threads of one process."""

    reads_whole_runs: bool
    """Whether runs should be fetched with all that they hold, since what is read is kept."""
    num_threads: int
    """That fetch at once."""

    def fetch(self, payloads: Payloads) -> Run:
        """Returns payloads, unchecked, or has them read ahead."""
        ...

    def checked(self, run: Run, number: int, payloads: Payloads, row: int, into: Array | None = None) -> Array:
        """Returns a payload, valid until the next call in this thread.

        Args:
            run: Fetched.
            number: The payload's, in the run.
            payloads: Where it lies,
            row: in this row.
            into: Where it is put; None: anywhere.

        Raises:
            DamagedError: naming shard and offset.
        """
        ...


def open_reader(store: Store, shards: list[str], copies: LocalCopies | None) -> RunReader:
    """Returns the reader of a store.

    Args:
        store: The cache's.
        shards: Their names, by number.
        copies: Keeps what is read from an object store; None keeps nothing.
    """
    root = store.local_path("shards")
    return ObjectReader(store, shards, copies) if root is None else FolderReader(root.parent, shards)


class FolderReader:
    """Reads from a folder."""

    reads_whole_runs = False
    num_threads = 1

    def __init__(self, root: Path, shards: list[str]) -> None:
        self._paths = [root / shard for shard in shards]
        self._files = ShardFiles()
        self._scratch = threading.local()

    def fetch(self, payloads: Payloads) -> Run:
        stretches, place, offset = merge_payloads(payloads, FOLDER_GAP_BYTES)
        for stretch in stretches:
            self._files.read_ahead(self._paths[stretch.shard], stretch.offset, stretch.num_bytes)
        return Run(stretches=stretches, place=place, offset=offset, fetched=[])

    def checked(self, run: Run, number: int, payloads: Payloads, row: int, into: Array | None = None) -> Array:
        length, shard, offset = int(payloads.num_bytes[row]), int(payloads.shard[row]), int(payloads.offset[row])
        if into is None:
            into = self._memory(length)
        data = self._files.read(self._paths[shard], offset, into)
        problem = _problem(data, length, int(payloads.crc32c[row]))
        if problem is not None:
            raise _damaged(f"{self._paths[shard]}, offset {offset}", problem, missing=shard if data is None else None)
        assert data is not None
        return data

    def _memory(self, num_bytes: int) -> Array:
        """Returns memory of this thread that is used again and again: fresh memory costs more than filling it."""
        scratch: Array | None = getattr(self._scratch, "array", None)
        if scratch is None or len(scratch) < num_bytes:
            self._scratch.array = scratch = np.empty(2 * num_bytes, np.uint8)
        return scratch[:num_bytes]


class ObjectReader:
    """Reads from an object store."""

    num_threads = 32

    def __init__(self, store: Store, shards: list[str], copies: LocalCopies | None) -> None:
        self._store, self._shards, self._copies = store, shards, copies
        self.reads_whole_runs = copies is not None

    def fetch(self, payloads: Payloads) -> Run:
        stretches, place, offset = merge_payloads(payloads, OBJECT_GAP_BYTES)
        return Run(stretches=stretches, place=place, offset=offset, fetched=self._read(stretches))

    def checked(self, run: Run, number: int, payloads: Payloads, row: int, into: Array | None = None) -> Array:
        length, crc32c = int(payloads.num_bytes[row]), int(payloads.crc32c[row])
        shard, offset = int(payloads.shard[row]), int(payloads.offset[row])
        whole, start = run.fetched[run.place[number]], int(run.offset[number])
        data = None if whole is None else whole[start : start + length]
        problem = _problem(data, length, crc32c)
        if problem is not None and self._copies is not None:  # the copy may be what is damaged
            stretch = run.stretches[run.place[number]]
            self._copies.drop(self._shards[shard], stretch.offset, stretch.num_bytes)
            data = self._request([Stretch(shard=shard, offset=offset, num_bytes=length)])[0]
            problem = _problem(data, length, crc32c)
        if problem is not None:
            where = f"{self._store.url}/{self._shards[shard]}, offset {offset}"
            raise _damaged(where, problem, missing=shard if data is None else None)
        assert data is not None
        if into is None:
            return data
        into[:] = data
        return into

    def _read(self, stretches: list[Stretch]) -> list[Array | None]:
        if self._copies is None:
            return self._request(stretches)
        kept = [self._copies.read(self._shards[s.shard], s.offset, s.num_bytes) for s in stretches]
        missing = [number for number, data in enumerate(kept) if data is None]
        for number, data in zip(missing, self._request([stretches[number] for number in missing]), strict=True):
            kept[number] = data
            stretch = stretches[number]
            if data is not None and len(data) == stretch.num_bytes:
                self._copies.keep(self._shards[stretch.shard], stretch.offset, data)
        return kept

    def _request(self, stretches: list[Stretch]) -> list[Array | None]:
        by_shard: dict[int, list[int]] = defaultdict(list)
        for number, stretch in enumerate(stretches):
            by_shard[stretch.shard].append(number)
        fetched: list[Array | None] = [None] * len(stretches)
        for shard, numbers in by_shard.items():
            ranges = [(stretches[number].offset, stretches[number].num_bytes) for number in numbers]
            try:
                parts = self._store.read_ranges(self._shards[shard], ranges)
            except FileNotFoundError:
                continue
            for number, part in zip(numbers, parts, strict=True):
                fetched[number] = np.frombuffer(part, np.uint8)
        return fetched


def run_payloads(columns: IndexColumns, rows: Array, captions: Array) -> Payloads:
    """Returns the latents of ``rows``, then the ``captions`` (their numbers), as one list of payloads."""
    latent, caption = columns.latent.take(rows), columns.caption.take(captions)
    return Payloads(
        shard=np.concatenate([latent.shard, caption.shard]),
        offset=np.concatenate([latent.offset, caption.offset]),
        num_bytes=np.concatenate([latent.num_bytes, caption.num_bytes]),
        crc32c=np.concatenate([latent.crc32c, caption.crc32c]),
        codec=np.concatenate([latent.codec, caption.codec]),
    )


def _problem(data: Array | None, length: int, crc32c: int) -> str | None:
    """Returns what is wrong with a payload."""
    if data is None:
        return "the shard is missing"
    if len(data) != length:
        return f"found {len(data)} bytes, expected {length}: the shard is cut short"
    if crc32c >= 0 and (found := google_crc32c.value(data)) != crc32c:
        return f"found CRC32C {found:08x}, expected {crc32c:08x}: the shard is corrupt"
    return None


def _damaged(where: str, problem: str, *, missing: int | None) -> DamagedError:
    return DamagedError(f"{where}: {problem}: run preprocess.verify", missing_shard=missing)
