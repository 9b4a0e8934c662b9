"""The bytes of a cache, from the writers' own arithmetic. Pure: no torch, no files."""

import math
from dataclasses import dataclass

from shared.cache import layout
from shared.spec import Bucket, Codec, VaeGeometry, latent_bytes, latent_shape, text_bytes

_CHARACTERS_PER_TOKEN = 4.5
"""Of English captions in T5's vocabulary; for the length of the caption beside each sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleShape:
    """What one sample holds."""

    bucket: Bucket
    vae: VaeGeometry
    text_channels: int
    num_tokens: float
    """Stored tokens a caption, on average."""
    num_captions: float = 1.0
    """Captions a sample, on average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleBytes:
    """What one sample takes, in bytes, on average."""

    text: float
    latent: float
    overhead: float
    """Headers, padding and JSON of the container, and the index."""

    @property
    def total(self) -> float:
        """All three."""
        return self.text + self.latent + self.overhead


def payload_bytes(shape: SampleShape, *, latent_codec: Codec, text_codec: Codec) -> SampleBytes:
    """Returns the bytes of the numbers alone, as if a cache had no containers and no index."""
    tokens = shape.num_tokens * shape.num_captions
    return SampleBytes(
        text=tokens * text_bytes(1, shape.text_channels, text_codec),
        latent=latent_bytes(latent_shape(shape.bucket, shape.vae), latent_codec),
        overhead=0.0,
    )


def tar_sample_bytes(shape: SampleShape, *, codec: Codec, shard_samples: float) -> SampleBytes:
    """Returns what a sample takes in a cache of tar shards, its share of the index included.

    Args:
        shape: What it holds.
        codec: Of both streams.
        shard_samples: Samples a shard; they share the end of the archive and the frame of an index fragment.
    """
    payload = payload_bytes(shape, latent_codec=codec, text_codec=codec)
    latent = latent_shape(shape.bucket, shape.vae)
    description = layout.sample_json(
        source="clips/00000000.mp4",
        captions=["x" * round(_CHARACTERS_PER_TOKEN * shape.num_tokens)] * max(round(shape.num_captions), 1),
        bucket=shape.bucket,
        fps=24.0,
        latent={"codec": codec, "shape": list(latent)},
        text={"codec": codec, "num_tokens": [round(shape.num_tokens)], "channels": shape.text_channels},
    )
    members = sum(layout.tar_member_bytes(math.ceil(size)) for size in (payload.latent, payload.text, len(description)))
    in_tar = layout.tar_bytes(round(members * shard_samples)) / shard_samples
    in_index = layout.INDEX_ROW_BYTES + layout.INDEX_FRAGMENT_BYTES / shard_samples
    return SampleBytes(
        text=payload.text, latent=payload.latent, overhead=in_tar - payload.text - payload.latent + in_index
    )
