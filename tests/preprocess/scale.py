"""Measures reading and planning a large manifest whose clips are probed.

``python -m tests.preprocess.scale FOLDER`` makes a manifest of 10 million clips and their probes in FOLDER, if they are
not there, plans them into 50 buckets, and prints seconds and memory.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.config import PreprocessConfig
from preprocess.dry_run import cache_to_plan
from preprocess.work import find_work
from shared.clips.probe_parts import SCHEMA
from shared.clips.probes import Probes
from shared.media.manifest import read_manifest
from shared.stores.local import LocalStore

Result = TypeVar("Result")

PART_ROWS = 1_000_000
SIZES = ["256x256", "240x320", "320x240", "240x424", "424x240", "512x512", "480x640", "640x480", "480x848", "848x480"]
BUCKETS = tuple(f"{frames}x{size}" for frames in (1, 16, 32, 64, 128) for size in SIZES)


def make(folder: Path, num_rows: int) -> None:
    """Writes a manifest and its clips' probes; no clip exists."""
    folder.mkdir(parents=True)
    probes = Probes.open(LocalStore(folder / "probes"))
    schema = pa.schema([("path", pa.string()), ("text", pa.string())])
    with pq.ParquetWriter(folder / "clips.parquet", schema) as writer:
        for first in range(0, num_rows, PART_ROWS):
            numbers = range(first, min(num_rows, first + PART_ROWS))
            paths = [f"clips/{number // 1000:05}/{number:09}.mp4" for number in numbers]
            texts = [f"A caption of some forty characters, {number}" for number in numbers]
            writer.write_table(pa.table([pa.array(paths), pa.array(texts)], schema=schema))
            probes._parts.write(_probed(folder, paths))


def _probed(folder: Path, paths: list[str]) -> pa.Table:
    count, generator = len(paths), np.random.default_rng(len(paths[0]))
    known = {
        "source": paths,
        "url": [str(folder / path) for path in paths],
        "version": [f"{number}-0123456789abcdef" for number in range(count)],
        "num_frames": generator.integers(20, 400, count),
        "height": generator.choice([256, 360, 480, 720, 1080], count),
        "width": generator.choice([256, 480, 640, 1280, 1920], count),
        "fps_num": np.full(count, 24),
        "fps_den": np.ones(count, np.int64),
        "duration": np.full(count, 4.1),
        "rotation": np.zeros(count, np.int64),
        "is_image": np.zeros(count, bool),
        "codec": ["h264"] * count,
        "stamp": ["1"] * count,
        "sequence": np.full(count, 5),
    }
    columns = [
        pa.array(known[field.name]).cast(field.type) if field.name in known else pa.nulls(count, field.type)
        for field in SCHEMA
    ]
    return pa.table(columns, schema=SCHEMA)


def timed(name: str, work: Callable[[], Result]) -> Result:
    """Prints how long ``work`` takes, and returns what it returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    print(f"{name:<16} {time.perf_counter() - wall:6.1f} s, {time.process_time() - cpu:6.1f} s of CPU", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    options = parser.parse_args()
    if not options.folder.exists():
        make(options.folder, options.rows)
        sys.exit("made: run again to measure, in a process whose memory is its own")
    path = str(options.folder / "clips.parquet")
    config = PreprocessConfig(manifest=path, output=str(options.folder / "cache"), buckets=BUCKETS, preset="demo")
    config = config.resolved()
    cache = cache_to_plan(config)
    manifest = timed("manifest", lambda: read_manifest(path))
    probes = Probes.open(LocalStore(options.folder / "probes"))
    missing = timed("not probed", lambda: len(probes.missing(manifest)))
    table = timed("probes", lambda: probes.table_for(manifest))
    work = timed("plan", lambda: find_work(config, manifest, table, cache))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"{work.shards.num_samples} samples in {len(work.shards)} shards, {missing} not probed; {peak:.2f} GB at most"
    )


if __name__ == "__main__":
    main()
