"""Small caches with random content, written by the real writer."""

from pathlib import Path

import torch

from shared.cache.commit import Sample, ShardWriter
from shared.cache.dataset import Cache, Provenance
from shared.cache.identity import latent_id, shard_id
from shared.spec import Bucket

CHANNELS, TEXT_CHANNELS, MAX_TOKENS, STRIDE = 4, 16, 10, 8


def provenance() -> Provenance:
    return {
        "latent": {
            "model": "none",
            "weights_sha256": "latent weights",
            "precision": "float32",
            "latent_channels": CHANNELS,
            "spatial_stride": STRIDE,
            "temporal_stride": 1,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "posterior": "sample",
        },
        "text.t5": {
            "model": "none",
            "weights_sha256": "text weights",
            "precision": "float32",
            "text_channels": TEXT_CHANNELS,
            "max_tokens": MAX_TOKENS,
            "cleaning": "none",
        },
    }


def write_cache(
    root: Path,
    samples: dict[Bucket, int],
    *,
    captions_per_sample: int = 1,
    latent_channels: int = CHANNELS,
    seed: int = 0,
) -> Cache:
    """Writes one shard a bucket of random samples; the latents may have other channels than the provenance says."""
    cache = Cache.open_or_create(root, provenance())
    generator = torch.Generator().manual_seed(seed)
    for bucket, count in samples.items():
        names = [f"{bucket}-{seed}-{i}" for i in range(count)]
        ids = [latent_id(source=n, source_version="1", bucket=bucket, frame_interval=1) for n in names]
        size = (latent_channels, bucket.num_frames, bucket.height // STRIDE, bucket.width // STRIDE)
        with ShardWriter(
            root, shard_id=shard_id(ids), bucket=bucket, codec="bfloat16", environment={}, clips_root=root
        ) as writer:
            for name, identity in zip(names, ids, strict=True):
                captions = tuple(f"{name}, told in way {k}" for k in range(captions_per_sample))
                lengths = torch.randint(1, MAX_TOKENS + 1, (captions_per_sample,), generator=generator).tolist()
                writer.add(
                    Sample(
                        sample=identity,
                        source=name,
                        source_version="1",
                        bucket=bucket,
                        frame_interval=1,
                        fps=8.0,
                        captions=captions,
                        cleaned_captions=captions,
                        latent=torch.randn(size, generator=generator),
                        texts=tuple(torch.randn(n, TEXT_CHANNELS, generator=generator) for n in lengths),
                    )
                )
            writer.commit()
    return cache
