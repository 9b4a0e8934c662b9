"""Measures opening, resolving and compacting the index of a large cache that holds no payloads.

``python -m tests.shared.cache.scale FOLDER`` makes 10,000 fragments of 64 samples beside a snapshot of 10 million, a
hundredth of them with newer texts, and prints seconds and memory.
"""

import argparse
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shared.cache.dataset import Cache
from shared.cache.fragments import find_files, fragment_path, read_covers, read_rows, write_fragment
from shared.cache.inventory import take_inventory
from shared.cache.live import find_live
from shared.cache.resolve import resolve
from shared.cache.schema import ABOUT, CAPTION, LATENT, SAMPLE, TEXT
from shared.cache.snapshot import PartWriter, ShardRecord, commit_snapshot
from shared.stores.store import Store
from tests.shared.cache.conftest import PROVENANCE

SHARD_SAMPLES = 1000
LOADER_COLUMNS = [
    *("num_frames", "height", "width", "fps", "latent.shape"),
    *(f"latent.{name}" for name in ("shard", "offset", "bytes", "crc32c", "codec")),
    *(
        f"text.t5.captions.list.element.{name}"
        for name in ("shard", "offset", "bytes", "crc32c", "codec", "num_tokens")
    ),
    "text.t5.channels",
]
"""What ``train`` reads of the index."""


def rows(first: int, count: int, *, shard_samples: int = SHARD_SAMPLES, only_texts: bool = False) -> pa.Table:
    """Returns ``count`` rows of samples, made without a Python object a row; each has one caption."""
    generator = np.random.default_rng(first)
    numbers = np.arange(first, first + count)
    identities = pa.array([f"{number * 0x9E3779B97F4A7C15 % (1 << 128):032x}" for number in numbers.tolist()])
    shard = pa.array(
        [f"shards/64x512x512/{number // shard_samples:032x}-0123456789abcdef.tar" for number in numbers.tolist()]
    )
    offset = pa.array(numbers % shard_samples * 600_000)
    crc = pa.array(generator.integers(0, 1 << 32, count))
    codec = pa.array(["int8@37+delta+zstd"]).take(pa.array(np.zeros(count, np.int64)))
    generation = pa.array(np.full(count, int(only_texts), np.int32))
    fours = pa.array(np.arange(0, 4 * count + 1, 4, dtype=np.int32))
    floats = pa.ListArray.from_arrays(fours, pa.array(generator.standard_normal(4 * count, np.float32)))
    shape = pa.ListArray.from_arrays(fours, pa.array(np.tile(np.array([4, 64, 64, 64], np.int32), count)))
    size = pa.array(np.full(count, 590_000))
    latent = [generation, shard, offset, size, crc, codec, shape, floats, floats]
    caption = [
        identities,
        pa.array([f"A caption of clip {n}" for n in numbers.tolist()]),
        shard,
        offset,
        size,
        crc,
        codec,
    ]
    caption.append(pa.array(np.full(count, 60, np.int32)))
    captions = pa.ListArray.from_arrays(
        pa.array(np.arange(count + 1, dtype=np.int32)),
        pa.StructArray.from_arrays(caption, fields=[CAPTION.field(i) for i in range(CAPTION.num_fields)]),
    )
    channels = pa.array(np.full(count, 4096, np.int32))
    text = pa.StructArray.from_arrays(
        [generation, channels, captions], fields=[TEXT.field(i) for i in range(TEXT.num_fields)]
    )
    if only_texts:
        return pa.table({"sample": identities, "text.t5": text})
    constant = {name: pa.array(np.full(count, value)) for name, value in (("num_frames", 64), ("height", 512))}
    about: dict[str, Any] = {
        "source": pa.array([f"clips/{number // 1000}/{number}.mp4" for number in numbers.tolist()]),
        "source_version": pa.array([f"{number * 7919 % 10**7}-{number:016x}" for number in numbers.tolist()]),
        **constant,
        "width": constant["height"],
        "frame_interval": pa.array(np.ones(count, np.int64)),
        "fps": pa.array(np.full(count, 24.0)),
    }
    return pa.table(
        {
            "sample": identities,
            **{field.name: about[field.name].cast(field.type) for field in ABOUT},
            "latent": pa.StructArray.from_arrays(latent, fields=[LATENT.field(i) for i in range(LATENT.num_fields)]),
            "text.t5": text,
        }
    )


def make_cache(
    root: Path, *, num_samples: int, num_fragments: int, fragment_samples: int = 64, num_overlays: int = 0
) -> Cache:
    """Makes a cache whose shards do not exist: a snapshot, and fragments beside it.

    Args:
        root: A new folder.
        num_samples: In the snapshot.
        num_fragments: Beside it, of new samples.
        fragment_samples: In each of them.
        num_overlays: Samples of the snapshot that have newer texts, in fragments of a thousand.
    """
    cache = Cache.open_or_create(root, PROVENANCE)
    if num_samples:
        _write_snapshot(cache.store, num_samples, num_fragments)
    for number in range(num_fragments):
        table = rows(num_samples + number * fragment_samples, fragment_samples, shard_samples=fragment_samples)
        _write(cache.store, table, f"{number:032x}")
    for number in range(num_overlays // 1000):
        table = rows(number * 1000, 1000, only_texts=True)
        _write(cache.store, table, f"f{number:031x}")
    return cache


def _write(store: Store, table: pa.Table, fragment_id: str) -> None:
    name = table.column("text.t5")[0]["captions"][0]["shard"].as_py()
    record = {"shard": name, "shard_bytes": 10**9, "shard_sha256": "0" * 64, "environment": {}, "kind": "samples"}
    write_fragment(store, fragment_id, table, record)


def _write_snapshot(store: Store, num_samples: int, num_covered: int) -> None:
    schema = pa.schema([*SAMPLE, *ABOUT, pa.field("latent", LATENT), pa.field("text.t5", TEXT)])
    parts = PartWriter(store, "snapshots/000001-0123456789abcdef", schema)
    shards = []
    for first in range(0, num_samples, 100_000):
        table = rows(first, min(100_000, num_samples - first))
        parts.add(table)
        names = table["latent"].combine_chunks().field("shard").unique().to_pylist()
        shards += [
            ShardRecord(shard=name, num_bytes=10**9, sha256="0" * 64, kind="samples", clips_root="", environment="{}")
            for name in names
        ]
    parts.flush()
    covers = [fragment_path(f"e{number:031x}") for number in range(num_covered)]
    commit_snapshot(store, 1, shards, covers=covers, parts=parts.parts)


def _measured(what: str, action: Callable[[], Any]) -> Any:
    begin, begin_cpu = time.monotonic(), time.process_time()
    result = action()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds, of_cpu = time.monotonic() - begin, time.process_time() - begin_cpu
    print(f"{what}: {seconds:.2f} s ({of_cpu:.2f} s of CPU), process at most {peak:.2f} GiB so far", flush=True)
    return result


def main() -> None:
    """Prints one line a step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--fragments", type=int, default=10_000)
    parser.add_argument("--overlays", type=int, default=100_000)
    parser.add_argument("--steps", nargs="+", default=["read", "resolve", "live", "inventory"])
    options = parser.parse_args()
    root = options.folder / f"{options.samples}-{options.fragments}-{options.overlays}"
    if not root.exists():
        temporary = root.with_name(f"{root.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        sizes = {"num_samples": options.samples, "num_fragments": options.fragments, "num_overlays": options.overlays}
        _measured("making it", lambda: make_cache(temporary, **sizes))
        temporary.rename(root)
    cache = Cache.open(root)
    files = _measured("find_files", lambda: find_files(cache.store))
    if files.snapshot:
        _measured("read_covers", lambda: read_covers(cache.store, files.snapshot))
    columns = ["sample", "removed", "latent.generation", "text.t5.generation", *LOADER_COLUMNS]
    if "read" in options.steps:
        table = _measured("reading the loader's columns", lambda: read_rows(cache.store, files.paths(), columns))
        print(f"  {table.num_rows:,} rows, {table.nbytes / 2**30:.2f} GiB in memory")
        if "resolve" in options.steps:
            result = _measured("resolve", lambda: resolve(table))
            print(f"  {result.num_rows:,} samples")
            del result
        del table
    if "live" in options.steps:
        _measured("find_live", lambda: find_live(cache, files.paths()))
    if "inventory" in options.steps:
        _measured("take_inventory", lambda: take_inventory(cache, files))


if __name__ == "__main__":
    main()
