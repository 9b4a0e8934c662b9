"""Caches of synthetic samples, written by the real writer."""

import random
from pathlib import Path

import torch

from shared.cache.commit import ShardWriter
from shared.cache.dataset import Cache
from shared.cache.identity import text_id
from shared.cache.layout import Container
from shared.cache.rows import Sample, Text, sample_row
from shared.codec import Codec
from shared.spec import Bucket
from shared.stores.open import open_store

CHANNELS, TEXT_CHANNELS = 4, 256

_BUCKET = Bucket(16, 128, 128)
_TEXT = (
    "a wide street at night lit in teal between striped facades while the camera tilts slowly over people who walk "
    "past market stalls under red umbrellas and rain drums on glass roofs of old trains near mountains with snow"
)
_WORDS = _TEXT.split()


def write_cache(
    root: Path,
    *,
    latent_codec: str,
    text_codec: str,
    container: Container = "tar",
    posterior: str = "sample",
    bucket: Bucket = _BUCKET,
    num_samples: int = 48,
    shard_samples: int = 24,
    num_captions: int = 1,
    manifest: bool = False,
) -> Path:
    """Returns the folder of a cache of random latents that change smoothly in time, and captions of unequal length."""
    channels = CHANNELS * (2 if posterior == "mean+logvar" else 1)
    latent = {"latent_channels": CHANNELS, "spatial_stride": 8, "temporal_stride": 1, "posterior": posterior}
    text = {"text_channels": TEXT_CHANNELS, "max_tokens": 120}
    Cache.open_or_create(root, {"latent": latent, "text.t5": text})
    codecs = {"latent": Codec.parse(latent_codec), "text.t5": Codec.parse(text_codec)}
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    shape = (channels, bucket.num_frames, bucket.height // 8, bucket.width // 8)
    for start in range(0, num_samples, shard_samples):
        with ShardWriter(
            open_store(root),
            shard_id=rng.randbytes(16).hex(),
            folder=str(bucket),
            container=container,
            record={"clips_root": "/data/clips", "environment": {"device": "cpu", "torch": "2.13.0", "threads": 1}},
        ) as writer:
            for number in range(start, min(start + shard_samples, num_samples)):
                captions = [" ".join(rng.choices(_WORDS, k=rng.randrange(20, 70))) for _ in range(num_captions)]
                still, moving = torch.randn((2, *shape), generator=generator)
                sample = Sample(
                    sample=rng.randbytes(16).hex(),
                    source=f"clips/{number:08d}.mp4",
                    source_version=f"{rng.randrange(10**7)}-{rng.randbytes(8).hex()}",
                    bucket=bucket,
                    frame_interval=1,
                    fps=24.0,
                    latent=still[:, :1] + 0.3 * moving,
                    texts={"text.t5": tuple(_text(caption, generator) for caption in captions)},
                    manifest={"aesthetic": rng.random(), "camera": rng.choice(["pan", "still"])} if manifest else {},
                )
                writer.add(*sample_row(sample, codecs, 0))
            writer.commit()
    return root


def _text(caption: str, generator: torch.Generator) -> Text:
    num_tokens = min(round(1.3 * len(caption.split())), 120)
    embedding = torch.randn(num_tokens, TEXT_CHANNELS, generator=generator)
    return Text(id=text_id(caption), caption=caption, embedding=embedding)
