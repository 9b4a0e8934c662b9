"""Measures two ways of keeping texts in a Zarr shard: ``python -m tests.shared.cache.zarr_layouts``.

*one array a caption* is what ``ZarrShardWriter`` writes. *packed* is one array of all tokens (sum of L, D) in chunks of
a fixed number of tokens, with an array of offsets and, for int8, one of exponents, written by zarr-python with the same
codecs. Both are one stored zip file. docs/zarr.md gives the figures.
"""

import argparse
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import tensorstore
import torch
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import ZipStore

from shared.cache.payload import encode, stored_array
from shared.cache.shard_file import StoredArray
from shared.cache.zarr_zip import ZarrShardWriter
from shared.codec import Codec

STREAM = "text.t5"
NUM_CAPTIONS, MIN_TOKENS, MAX_TOKENS, CHANNELS = 64, 20, 120, 4096
CODECS = ("bfloat16", "int8@30+zstd")
CHUNK_TOKENS = (16, 64, 256)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One layout of the captions on disk."""

    layout: str
    path: Path
    spans: list[list[str]]
    """For each caption, the zip entries that a reader by offsets has to read for it."""
    read_caption: Callable[[zarr.Group, int], int]
    """Reads one caption with zarr-python; returns the bytes of its stored array."""
    arrays: list[str]
    """What a reader of the whole shard reads."""


def make_captions() -> list[torch.Tensor]:
    """Returns embeddings (L, D) whose channels have spreads of their own, as T5's have."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(torch.randn(CHANNELS, generator=generator) * 0.5)
    lengths = torch.randint(MIN_TOKENS, MAX_TOKENS + 1, (NUM_CAPTIONS,), generator=generator).tolist()
    return [torch.randn(length, CHANNELS, generator=generator) * spread for length in lengths]


def one_array_a_caption(folder: Path, captions: list[StoredArray]) -> Shard:
    """Returns the layout of ``ZarrShardWriter``."""
    path = folder / "captions.zip"
    with open(path, "wb") as file:
        writer = ZarrShardWriter(file)
        for number, caption in enumerate(captions):
            writer.add(f"{number:032x}", {STREAM: [caption]}, b"{}")
        writer.finish()

    def read(group: zarr.Group, number: int) -> int:
        return int(group[f"{STREAM}/{number}"][:].nbytes)  # type: ignore[index, union-attr]

    return Shard(
        layout="one array a caption",
        path=path,
        spans=[[f"{STREAM}/{number}/c/0/0"] for number in range(len(captions))],
        read_caption=read,
        arrays=[f"{STREAM}/{number}" for number in range(len(captions))],
    )


def packed(folder: Path, captions: list[StoredArray], chunk_tokens: int) -> Shard:
    """Returns the layout of packed tokens and offsets."""
    codec = captions[0].codec
    stored = [stored_array(caption.payload, codec, caption.shape) for caption in captions]
    if codec.values == "int8":
        exponents, stored = np.stack([array[0] for array in stored]), [array[1:] for array in stored]
    offsets = np.cumsum([0, *map(len, stored)])
    root = folder / f"packed-{chunk_tokens}"
    group = zarr.create_group(root)
    compressors = [*([ZstdCodec(level=3)] if codec.zstd else []), Crc32cCodec()]
    tokens = np.concatenate(stored)
    group.create_array("tokens", data=tokens, chunks=(chunk_tokens, CHANNELS), compressors=compressors)
    group.create_array("offsets", data=offsets, compressors=compressors)
    arrays = ["tokens", "offsets"]
    if codec.values == "int8":
        group.create_array("exponents", data=exponents, chunks=(1, CHANNELS), compressors=compressors)
        arrays.append("exponents")
    zarr.consolidate_metadata(root)
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        names = [file.relative_to(root) for file in root.rglob("*") if file.is_file()]
        for name in sorted(names, key=lambda name: [part.zfill(8) for part in name.parts]):
            archive.write(root / name, name.as_posix())
    ends = [(int(start), int(end)) for start, end in pairwise(offsets)]

    def read(group: zarr.Group, number: int) -> int:
        start, end = ends[number]  # kept in memory, as a reader would
        num_bytes = group["tokens"][start:end].nbytes  # type: ignore[index, union-attr]
        if codec.values == "int8":
            num_bytes += group["exponents"][number].nbytes  # type: ignore[index, union-attr]
        return int(num_bytes)

    return Shard(
        layout=f"packed, chunks of {chunk_tokens} tokens",
        path=path,
        spans=[
            [f"tokens/c/{chunk}/0" for chunk in range(start // chunk_tokens, (end - 1) // chunk_tokens + 1)]
            + ([f"exponents/c/{number}/0"] if codec.values == "int8" else [])
            for number, (start, end) in enumerate(ends)
        ],
        read_caption=read,
        arrays=arrays,
    )


def measure(shard: Shard, payload_bytes: list[int]) -> dict[str, float]:
    """Returns the figures of one layout; the file is in memory, so they are what the libraries themselves take.

    Args:
        shard: The layout.
        payload_bytes: What each caption takes by itself: what a reader by offsets wants to read.
    """
    with zipfile.ZipFile(shard.path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    figures = {
        "shard MB": shard.path.stat().st_size / 1e6,
        "read amplification": sum(sizes[name] for span in shard.spans for name in span) / sum(payload_bytes),
    }
    group = zarr.open_group(ZipStore(shard.path), mode="r")
    order = np.random.default_rng(0).permutation(len(shard.spans)).tolist()
    start = time.perf_counter()
    for number in order:
        shard.read_caption(group, number)
    figures["zarr ms/caption"] = (time.perf_counter() - start) / len(order) * 1e3

    start = time.perf_counter()
    group = zarr.open_group(ZipStore(shard.path), mode="r")
    num_bytes = sum(group[name][:].nbytes for name in shard.arrays)  # type: ignore[index, union-attr, misc]
    figures["zarr whole MB/s"] = num_bytes / (time.perf_counter() - start) / 1e6

    start = time.perf_counter()
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 100_000_000}})
    base = {"driver": "zip", "base": {"driver": "file", "path": str(shard.path)}}
    opening = [
        tensorstore.open({"driver": "zarr3", "kvstore": {**base, "path": f"{name}/"}}, context=context)
        for name in shard.arrays
    ]
    reading = [array.result().read() for array in opening]
    num_bytes = sum(array.result().nbytes for array in reading)
    figures["tensorstore whole MB/s"] = num_bytes / (time.perf_counter() - start) / 1e6
    return figures


def main() -> None:
    """Prints a table of all layouts; each time is the best of the repeats."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    embeddings = make_captions()
    print(f"{NUM_CAPTIONS} captions, {sum(map(len, embeddings)):,} tokens x {CHANNELS}")
    header: list[str] = []
    for codec in map(Codec.parse, CODECS):
        captions = [
            StoredArray(payload=encode(caption, codec), codec=codec, shape=tuple(caption.shape))
            for caption in embeddings
        ]
        payload_bytes = [len(caption.payload) for caption in captions]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shards = [one_array_a_caption(folder, captions)]
            shards += [packed(folder, captions, chunk) for chunk in CHUNK_TOKENS]
            for shard in shards:
                rows = [measure(shard, payload_bytes) for _ in range(repeats)]
                best = {key: (min if key.endswith("caption") else max)(row[key] for row in rows) for key in rows[0]}
                if not header:
                    header = list(best)
                    print(f"| codec | layout | {' | '.join(header)} |\n|{'---|' * (len(header) + 2)}")
                print(f"| `{codec}` | {shard.layout} | {' | '.join(f'{value:.4g}' for value in best.values())} |")


if __name__ == "__main__":
    main()
