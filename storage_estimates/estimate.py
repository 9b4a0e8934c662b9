"""The bytes of a cache, from the writers' own arithmetic. Pure: no torch, no files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.cache import layout
from shared.cache.zarr_layout import MeanStream, mean_zarr_shard_bytes
from shared.codec import Codec, raw_bytes
from shared.shard_size import samples_a_shard
from shared.spec import Bucket, Posterior, VaeGeometry, latent_shape
from storage_estimates.bits import BitsTable, Material

CHARACTERS_PER_TOKEN = 4.5
"""Of English captions in T5's vocabulary; for the length of the caption beside each sample."""
FIXED_OBJECTS = 2
"""dataset.json and the null caption."""

_INDEX_FRAGMENT_BYTES = 11_000
"""A Parquet fragment before its first row: schema, statistics of columns, record. This and what follows: measured."""
_INDEX_MANIFEST_BYTES = 650
"""More, where the manifest has other columns."""
_INDEX_ROW_BYTES = 63
"""Identity, source, version and places, compressed; hashes and checksums do not compress."""
_INDEX_CHANNEL_BYTES = 10
"""Mean and standard deviation of a latent's channel."""
_INDEX_CAPTION_BYTES = 32
"""Identity and place."""
_INDEX_BYTES_PER_CHARACTER = 0.4
"""Of a caption's text, compressed."""

_OUTLINED_SAMPLES = 128
"""A Zarr shard of more samples than twice this grows in a straight line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Samples of one bucket."""

    bucket: Bucket
    num_samples: int
    num_tokens: float
    """Stored tokens a caption, on average."""
    num_captions: float = 1.0
    """Captions a sample, on average."""
    caption_characters: float | None = None
    """Of a caption, on average; None: as English has for so many tokens."""
    source_characters: int = 18
    """Of a clip's path in the manifest, on average."""
    manifest_bytes: int = 0
    """Of the manifest's other columns as JSON, on average."""
    shard_samples: float | None = None
    """Samples a shard; None: as many as ``preprocess`` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoders:
    """What decides the shapes of latents and embeddings."""

    vae: str
    """Its label."""
    geometry: VaeGeometry
    text_channels: int
    max_tokens: int
    pixels_per_second: float
    """Of the autoencoder on the measured GPU; bounds the GPU time of a shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way of storing samples."""

    latent_codec: Codec
    text_codec: Codec
    container: layout.Container = "tar"
    posterior: Posterior = "sample"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSize:
    """What a cache takes."""

    choice: Choice
    num_samples: int
    num_shards: int
    latent_bytes: float
    text_bytes: float
    overhead_bytes: float
    """Headers, padding and descriptions of the container, and the index."""

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return self.latent_bytes + self.text_bytes + self.overhead_bytes

    @property
    def num_objects(self) -> int:
        """Files or objects: a shard and its index fragment each, and those of the cache itself."""
        return 2 * self.num_shards + FIXED_OBJECTS


def material(geometry: VaeGeometry, bucket: Bucket) -> Material:
    """Returns what kind of latent a bucket gives, for the bits of entropy-coded codecs."""
    if latent_shape(bucket, geometry)[1] == 1:
        return "still"
    return "video" if geometry.temporal_stride > 1 else "frames"


def stored_latent_shape(bucket: Bucket, encoders: Encoders, choice: Choice) -> tuple[int, int, int, int]:
    """Returns the shape of a stored latent: (C, T, H, W), or (2C, T, H, W) with the logarithm of the variance."""
    channels, *rest = latent_shape(bucket, encoders.geometry)
    frames, height, width = rest
    return (channels * (2 if choice.posterior == "mean+logvar" else 1), frames, height, width)


def latent_payload_bytes(bucket: Bucket, encoders: Encoders, choice: Choice, bits: BitsTable) -> float:
    """Returns the bytes of one latent."""
    shape = stored_latent_shape(bucket, encoders, choice)
    if not choice.latent_codec.zstd:
        return raw_bytes(choice.latent_codec, shape)
    found = bits.get(choice.latent_codec, material(encoders.geometry, bucket))
    return math.prod(shape) * found.per_value / 8


def text_payload_bytes(num_tokens: float, encoders: Encoders, codec: Codec, bits: BitsTable) -> float:
    """Returns the bytes of one caption's embedding, of so many tokens on average."""
    if codec.zstd:
        return num_tokens * encoders.text_channels * bits.get(codec, "text").per_value / 8
    none, one = (raw_bytes(codec, (tokens, encoders.text_channels)) for tokens in (0, 1))
    return none + (one - none) * num_tokens


def estimate(groups: Sequence[Group], encoders: Encoders, choice: Choice, bits: BitsTable) -> CacheSize:
    """Returns what the samples of all groups take."""
    latent = text = overhead = 0.0
    num_shards = 0
    for group in groups:
        size = _group_size(group, encoders, choice, bits)
        latent, text = latent + size.latent_bytes, text + size.text_bytes
        overhead, num_shards = overhead + size.overhead_bytes, num_shards + size.num_shards
    return CacheSize(
        choice=choice,
        num_samples=sum(group.num_samples for group in groups),
        num_shards=num_shards,
        latent_bytes=latent,
        text_bytes=text,
        overhead_bytes=overhead,
    )


def _group_size(group: Group, encoders: Encoders, choice: Choice, bits: BitsTable) -> CacheSize:
    latent = latent_payload_bytes(group.bucket, encoders, choice, bits)
    text = text_payload_bytes(group.num_tokens, encoders, choice.text_codec, bits)
    texts = text * group.num_captions
    description = len(_description(group, encoders, choice, text))
    shard_samples = min(group.shard_samples or _shard_samples(group.bucket, encoders, choice), group.num_samples)
    num_shards = math.ceil(group.num_samples / shard_samples)
    shard: float
    if choice.container == "tar":
        members = sum(map(_tar_member_bytes, (latent, texts, description)))
        shard = layout.tar_bytes(round(members * shard_samples))
    else:
        shard = _zarr_bytes(group, encoders, choice, shard_samples, (latent, text, description))
    channels = stored_latent_shape(group.bucket, encoders, choice)[0]
    index = index_bytes(group, channels, shard_samples) / shard_samples
    return CacheSize(
        choice=choice,
        num_samples=group.num_samples,
        num_shards=num_shards,
        latent_bytes=latent * group.num_samples,
        text_bytes=texts * group.num_samples,
        overhead_bytes=(shard / shard_samples - latent - texts + index) * group.num_samples,
    )


def index_bytes(group: Group, channels: int, shard_samples: float) -> float:
    """Returns the bytes of an index fragment of so many samples, whose latents have so many channels."""
    caption = _INDEX_CAPTION_BYTES + _INDEX_BYTES_PER_CHARACTER * _caption_characters(group)
    row = _INDEX_ROW_BYTES + _INDEX_CHANNEL_BYTES * channels + group.num_captions * caption
    if not group.manifest_bytes:
        return _INDEX_FRAGMENT_BYTES + row * shard_samples
    manifest = _INDEX_BYTES_PER_CHARACTER * group.manifest_bytes
    return _INDEX_FRAGMENT_BYTES + _INDEX_MANIFEST_BYTES + (row + manifest) * shard_samples


def _shard_samples(bucket: Bucket, encoders: Encoders, choice: Choice) -> int:
    stored = stored_latent_shape(bucket, encoders, choice)
    return samples_a_shard(
        sample_bytes=raw_bytes(choice.latent_codec, stored)
        + raw_bytes(choice.text_codec, (encoders.max_tokens, encoders.text_channels)),
        sample_pixels=bucket.num_frames * bucket.height * bucket.width,
        pixels_per_second=encoders.pixels_per_second,
    )


def _caption_characters(group: Group) -> int:
    if group.caption_characters is not None:
        return round(group.caption_characters)
    return round(CHARACTERS_PER_TOKEN * group.num_tokens)


def _description(group: Group, encoders: Encoders, choice: Choice, text_bytes: float) -> bytes:
    captions = max(round(group.num_captions), 1)
    about: dict[str, Any] = {
        "source": "x" * group.source_characters,
        "num_frames": group.bucket.num_frames,
        "height": group.bucket.height,
        "width": group.bucket.width,
        "fps": 24.0,
    }
    if group.manifest_bytes:
        about["manifest"] = "x" * (group.manifest_bytes - len('""'))
    shape = stored_latent_shape(group.bucket, encoders, choice)
    text = layout.text_json(
        str(choice.text_codec),
        encoders.text_channels,
        ["x" * _caption_characters(group)] * captions,
        [round(group.num_tokens)] * captions,
        [round(text_bytes)] * captions,
    )
    latent = layout.latent_json(str(choice.latent_codec), shape)
    return layout.sample_json(about, {layout.LATENT_STREAM: latent, layout.TEXT_STREAM: text})


def _tar_member_bytes(payload: float) -> float:
    """Returns what a member takes: exactly for whole bytes, else on average over many sizes."""
    if payload == int(payload):
        return layout.tar_member_bytes(int(payload))
    return layout.tar_member_bytes(0) * 1.5 + payload


def _zarr_bytes(
    group: Group, encoders: Encoders, choice: Choice, shard_samples: float, sizes: tuple[float, float, int]
) -> float:
    """Returns the bytes of a Zarr shard."""
    latent, text, description = sizes
    streams = {
        layout.LATENT_STREAM: MeanStream(
            codec=choice.latent_codec, shape=stored_latent_shape(group.bucket, encoders, choice), mean_bytes=latent
        ),
        layout.TEXT_STREAM: MeanStream(
            codec=choice.text_codec,
            shape=(max(round(group.num_tokens), 1), encoders.text_channels),
            mean_bytes=text,
            arrays_per_sample=group.num_captions,
        ),
    }
    if shard_samples <= 2 * _OUTLINED_SAMPLES:
        whole = max(round(shard_samples), 1)
        return mean_zarr_shard_bytes(whole, streams, description) * shard_samples / whole
    one, two = (mean_zarr_shard_bytes(n * _OUTLINED_SAMPLES, streams, description) for n in (1, 2))
    return one + (two - one) * (shard_samples / _OUTLINED_SAMPLES - 1)
