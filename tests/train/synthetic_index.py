"""Large indices that were never encoded: a committed cache whose rows all name places in one small shard."""

import json
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa

from shared.cache.dataset import Cache
from shared.cache.fragments import write_fragment
from shared.cache.schema import LATENT, TEXT
from tests.train.synthetic_cache import CHANNELS, STRIDE, TEXT_CHANNELS, provenance

ROWS_A_FRAGMENT = 250_000
SAMPLES_A_SHARD = 10_000


def write_large_index(root: Path, num_rows: int, num_windows: int | None = None) -> Cache:
    """Returns a cache of ``num_rows`` samples of bucket 1x16x16, their bytes the same, spread over shards by name.

    With ``num_windows`` as many samples are windows of one clip: as many shards in turn hold those of the same clips.
    """
    cache = Cache.open_or_create(root, provenance())
    latent, text = bytes(CHANNELS * 4 * 2), bytes(TEXT_CHANNELS * 2)
    size = len(latent) + len(text)
    content = (latent + text) * SAMPLES_A_SHARD
    first = root / "shards" / "shard-000000.tar"
    first.parent.mkdir(parents=True, exist_ok=True)
    first.write_bytes(content)
    for number in range(1, -(-num_rows // SAMPLES_A_SHARD)):
        (first.parent / f"shard-{number:06d}.tar").symlink_to(first.name)
    checksums = google_crc32c.value(latent), google_crc32c.value(text)
    for start in range(0, num_rows, ROWS_A_FRAGMENT):
        rows = np.arange(start, min(start + ROWS_A_FRAGMENT, num_rows))
        table = _table(rows, size, len(latent), len(text), checksums)
        if num_windows:
            table = _with_windows(table, rows, num_windows)
        write_fragment(cache.store, f"fragment-{start:012d}", table, {"environment": {}})
    return cache


def _table(rows: np.ndarray, size: int, latent_bytes: int, text_bytes: int, checksums: tuple[int, int]) -> pa.Table:
    count = len(rows)
    names = [
        f"shards/shard-{number:06d}.tar"
        for number in range(rows[0] // SAMPLES_A_SHARD, rows[-1] // SAMPLES_A_SHARD + 1)
    ]
    codes = rows // SAMPLES_A_SHARD - rows[0] // SAMPLES_A_SHARD
    shards = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names)).cast(pa.string())
    offsets = (rows % SAMPLES_A_SHARD) * size
    generator = np.random.default_rng(rows[0])
    words = generator.integers(0, 1 << 63, (count, 2), dtype=np.uint64)

    def constant(value: object, kind: pa.DataType) -> pa.Array:
        return pa.repeat(pa.scalar(value, kind), count)

    def place(offset: np.ndarray, num_bytes: int, crc32c: int) -> dict[str, pa.Array]:
        return {
            "shard": shards,
            "offset": pa.array(offset, pa.int64()),
            "bytes": constant(num_bytes, pa.int64()),
            "crc32c": constant(crc32c, pa.int64()),
            "codec": constant("bfloat16", pa.string()),
        }

    def struct(fields: dict[str, pa.Array], kind: pa.StructType) -> pa.Array:
        return pa.StructArray.from_arrays([fields[f.name].cast(f.type) for f in kind], fields=list(kind))

    latent = place(offsets, latent_bytes, checksums[0]) | {
        "generation": constant(0, pa.int32()),
        "shape": constant([CHANNELS, 1, 16 // STRIDE, 16 // STRIDE], pa.list_(pa.int32())),
        "mean": constant([0.0] * CHANNELS, pa.list_(pa.float32())),
        "std": constant([0.0] * CHANNELS, pa.list_(pa.float32())),
    }
    caption_type = TEXT.field("captions").type.value_type
    caption = place(offsets + latent_bytes, text_bytes, checksums[1]) | {
        "id": constant("0" * 32, pa.string()),
        "caption": constant("a clip", pa.string()),
        "num_tokens": constant(1, pa.int32()),
    }
    captions = pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32), struct(caption, caption_type))
    text = {
        "generation": constant(0, pa.int32()),
        "channels": constant(TEXT_CHANNELS, pa.int32()),
        "captions": captions,
    }
    return pa.table(
        {
            "sample": pa.array([f"{a:016x}{b:016x}" for a, b in words.tolist()]),
            "source": constant("clip.mp4", pa.string()),
            "source_version": constant("1", pa.string()),
            "num_frames": constant(1, pa.int32()),
            "height": constant(16, pa.int32()),
            "width": constant(16, pa.int32()),
            "frame_interval": constant(1, pa.int32()),
            "fps": constant(8.0, pa.float64()),
            "latent": struct(latent, LATENT),
            "text.t5": struct(text, TEXT),
        }
    )


def _with_windows(table: pa.Table, rows: np.ndarray, num_windows: int) -> pa.Table:
    shards, places = np.divmod(rows, SAMPLES_A_SHARD)
    blocks, windows = np.divmod(shards, num_windows)
    sources = [f"videos/clip-{number:012d}.mp4" for number in (blocks * SAMPLES_A_SHARD + places).tolist()]
    table = table.set_column(table.column_names.index("source"), "source", pa.array(sources))
    return table.append_column("window", pa.array(windows * 16, pa.int32()))


def _measure(root: str, num_rows: str, steps: str) -> dict[str, float]:
    """Opens the index and reads batches of 256 in this process; returns seconds and memory on the way."""
    import time

    from train.loader import load_batches
    from train.plan import BatchPlan
    from train.rank_batches import LoaderJob
    from train.sample_index import SampleIndex

    cache = Cache.open(root)
    start = time.perf_counter()
    index = SampleIndex.open(cache, local_cache=Path(root) / "local")
    opened = time.perf_counter() - start
    peak = _status("VmHWM")
    plan = BatchPlan(index.buckets, batch_sizes=dict.fromkeys(index.buckets, 256), seed=0)
    job = LoaderJob.of_index(index, plan, rank=0, world_size=1, seed=0, caption_dropout=0.1)
    total, seen = int(steps), 0
    early = late = 0.0
    for step, batch in enumerate(load_batches(job, range(total), num_workers=0, pin_memory=False)):
        seen += len(batch)
        if step == total // 10:
            early = _status("RssAnon")
    late = _status("RssAnon")
    assert index.num_samples == int(num_rows)
    return {"open_seconds": opened, "peak_mb": peak, "early_mb": early, "late_mb": late, "samples": seen}


def _status(name: str) -> float:
    """Returns a field of this process's memory in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1000
    raise AssertionError(name)


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
