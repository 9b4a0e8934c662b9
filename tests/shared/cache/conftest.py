"""Small caches, written by the real writer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.cache.commit import ShardWriter
from shared.cache.dataset import Cache, CommittedShard, Provenance
from shared.cache.identity import text_id
from shared.cache.layout import Container
from shared.cache.rows import Sample, Text, sample_row
from shared.codec import Codec
from shared.spec import Bucket
from shared.stores.open import open_store

BUCKET = Bucket(2, 16, 24)

PROVENANCE: Provenance = {
    "latent": {"model": "a", "weights_sha256": "11", "latent_channels": 4, "scaling_factor": 0.5, "codec": "bfloat16"},
    "text.t5": {"model": "b", "weights_sha256": "22", "text_channels": 8, "max_tokens": 120, "codec": "bfloat16"},
}


def make_sample(number: int) -> Sample:
    """Returns a sample with two captions of different length; the same one for the same number."""
    generator = torch.Generator().manual_seed(number)
    return Sample(
        sample=f"{number:032x}",
        source=f"clips/näht {number}.mp4",
        source_version=f"100-{number}",
        bucket=BUCKET,
        frame_interval=1,
        fps=24000 / 1001,
        latent=torch.randn(4, 2, 2, 3, generator=generator),
        texts={
            "text.t5": tuple(
                Text(id=text_id(caption), caption=caption, embedding=torch.randn(tokens, 8, generator=generator))
                for caption, tokens in ((f"Caption {number}", 3), ("Another, longer caption", 5))
            )
        },
        manifest={"aesthetic": number / 2, "camera": "still"},
    )


ShardMaker = Callable[..., CommittedShard]


@pytest.fixture
def write_shard() -> ShardMaker:
    def write(
        url: str | Path,
        numbers: list[int],
        *,
        shard_id: str = "5" * 32,
        codec: str = "bfloat16",
        container: Container = "tar",
        generation: int = 0,
    ) -> CommittedShard:
        codecs = {"latent": Codec.parse(codec), "text.t5": Codec.parse(codec.replace("+delta", ""))}
        with ShardWriter(
            open_store(url),
            shard_id=shard_id,
            folder=str(BUCKET),
            container=container,
            record={"clips_root": "clips", "environment": {"device": "cpu"}, "kind": "samples"},
        ) as writer:
            for number in numbers:
                writer.add(*sample_row(make_sample(number), codecs, generation))
            return writer.commit()

    return write


@pytest.fixture
def cache(tmp_path: Path, write_shard: ShardMaker) -> Cache:
    """Two shards: samples 0 to 2, and 3."""
    root = tmp_path / "cache"
    cache = Cache.open_or_create(root, PROVENANCE)
    write_shard(root, [0, 1, 2], shard_id="a" * 32)
    write_shard(root, [3], shard_id="b" * 32)
    return cache
