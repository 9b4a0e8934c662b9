"""Small caches, written by the real writer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.cache.commit import Sample, ShardWriter
from shared.cache.dataset import Cache, CommittedShard, Provenance
from shared.spec import Bucket

BUCKET = Bucket(2, 16, 24)

PROVENANCE: Provenance = {
    "latent": {"model": "a", "weights_sha256": "11", "latent_channels": 4, "scaling_factor": 0.5},
    "text.t5": {"model": "b", "weights_sha256": "22", "text_channels": 8, "max_tokens": 120},
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
        captions=(f"Caption {number}", "Another, longer caption"),
        cleaned_captions=(f"caption {number}", "another, longer caption"),
        latent=torch.randn(4, 2, 2, 3, generator=generator),
        texts=(torch.randn(3, 8, generator=generator), torch.randn(5, 8, generator=generator)),
    )


ShardMaker = Callable[..., CommittedShard]


@pytest.fixture
def write_shard() -> ShardMaker:
    def write(root: Path, numbers: list[int], *, shard_id: str = "5" * 32, codec: str = "bfloat16") -> CommittedShard:
        with ShardWriter(
            root,
            shard_id=shard_id,
            bucket=BUCKET,
            codec=codec,
            clips_root=Path("clips"),
            environment={"device": "cpu"},
        ) as writer:
            for number in numbers:
                writer.add(make_sample(number))
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
