"""Samples as a writer of Zarr shards is given them."""

import json
from dataclasses import dataclass
from typing import Any

import torch

from shared.cache.payload import encode
from shared.cache.shard_file import Extent, ShardFile, StoredArray
from shared.cache.zarr_zip import ZarrShardWriter
from shared.codec import Codec

LATENT_SHAPE = (4, 5, 12, 16)
CHANNELS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a writer is given."""

    key: str
    streams: dict[str, list[StoredArray]]
    description: bytes


def make_samples(latent: str, text: str, num_samples: int = 3) -> list[Sample]:
    """Returns samples with one latent and one to three captions of different length."""
    generator = torch.Generator().manual_seed(5)

    def stored(codec: Codec, shape: tuple[int, ...]) -> StoredArray:
        values = torch.randn(shape, generator=generator)
        if len(shape) == 4:  # channels that are smooth in time, along rows, in both or in neither
            for channel, axes in enumerate([(), (0,), (2,), (0, 2)]):
                for axis in axes:
                    values[channel] = values[channel].cumsum(axis)
        return StoredArray(payload=encode(values, codec), codec=codec, shape=shape)

    samples = []
    for number in range(num_samples):
        lengths = [(7 * number + 5 * place) % 23 + 1 for place in range(number % 3 + 1)]
        texts = [stored(Codec.parse(text), (length, CHANNELS)) for length in lengths]
        streams = {"latent": [stored(Codec.parse(latent), LATENT_SHAPE)], "text.t5": texts}
        about = {"source": f"clips/näht {number}.mp4", "text.t5": {"captions": ["ein „Zitat“"] * len(texts)}}
        description = json.dumps(about, ensure_ascii=False).encode()
        samples.append(Sample(key=f"{number:032x}", streams=streams, description=description))
    return samples


def write(file: Any, samples: list[Sample]) -> tuple[list[dict[str, list[Extent]]], tuple[str, int]]:
    """Returns where the payloads lie, and the hash and length that the writer gives."""
    writer: ShardFile = ZarrShardWriter(file)
    extents = [writer.add(sample.key, sample.streams, sample.description) for sample in samples]
    return extents, writer.finish()
