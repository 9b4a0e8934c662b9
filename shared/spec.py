"""Sizes: buckets and latent shapes. Pure, and free of torch.

Letters: C latent channels, T latent frames, H and W latent rows and columns.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shared.errors import InputError

_BUCKET = re.compile(r"^(\d+)x(\d+)x(\d+)$")

Posterior = Literal["sample", "mean", "mean+logvar"]
"""What is stored of a VAE's posterior: one sample, its mean, or mean and logarithm of the variance."""


@dataclass(frozen=True, order=True, slots=True)
class Bucket:
    """The size to which clips are brought before encoding."""

    num_frames: int
    height: int
    """In pixels."""
    width: int
    """In pixels."""

    def __post_init__(self) -> None:
        if min(self.num_frames, self.height, self.width) < 1:
            raise InputError(f"bucket {self}: expected at least one frame, one row and one column")

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Returns the bucket written as ``FRAMESxHEIGHTxWIDTH``, e.g. ``16x256x256``.

        Raises:
            InputError: if the text has another form.
        """
        match = _BUCKET.match(text)
        if match is None:
            raise InputError(f"bucket {text!r}: expected FRAMESxHEIGHTxWIDTH, e.g. 16x256x256")
        return cls(*(int(part) for part in match.groups()))


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeGeometry:
    """How an autoencoder maps pixels to latents."""

    latent_channels: int
    spatial_stride: int
    temporal_stride: int = 1
    """1 for image autoencoders, which encode every frame by itself."""
    chunk_frames: int | None = None
    """Clips are cut into chunks of this many frames, each encoded by itself: 17 for Open-Sora's. None: never cut."""

    @classmethod
    def recorded(cls, provenance: Mapping[str, Any]) -> "VaeGeometry":
        """Returns the geometry that a cache's provenance of its latents holds."""
        return cls(
            latent_channels=provenance["latent_channels"],
            spatial_stride=provenance["spatial_stride"],
            temporal_stride=provenance.get("temporal_stride", 1),
            chunk_frames=provenance.get("chunk_frames"),
        )


def latent_shape(bucket: Bucket, vae: VaeGeometry) -> tuple[int, int, int, int]:
    """Returns the shape (C, T, H, W) of one sample's latent; with mean and log-variance, 2 C channels are stored.

    Raises:
        InputError: if the bucket's height or width is not a multiple of the spatial stride, or its frames do not suit
            the temporal stride (``s * k + 1`` frames; any number of an autoencoder that cuts clips into chunks).
    """
    for name, pixels in (("height", bucket.height), ("width", bucket.width)):
        if pixels % vae.spatial_stride:
            low = pixels // vae.spatial_stride * vae.spatial_stride
            choices = " or ".join(str(n) for n in (low, low + vae.spatial_stride) if n)
            raise InputError(
                f"bucket {bucket}: {name}={pixels} is not divisible by the VAE's spatial stride of "
                f"{vae.spatial_stride}: use {choices}"
            )
    return (
        vae.latent_channels,
        _latent_frames(bucket, vae),
        bucket.height // vae.spatial_stride,
        bucket.width // vae.spatial_stride,
    )


def _latent_frames(bucket: Bucket, vae: VaeGeometry) -> int:
    frames, stride = bucket.num_frames, vae.temporal_stride
    if vae.chunk_frames is not None:
        chunks, rest = divmod(frames, vae.chunk_frames)
        return chunks * math.ceil(vae.chunk_frames / stride) + math.ceil(rest / stride)
    if (frames - 1) % stride:
        low = (frames - 1) // stride * stride + 1
        raise InputError(
            f"bucket {bucket}: {frames} frames do not suit the VAE's temporal stride of {stride}: "
            f"use {low} or {low + stride}"
        )
    return math.ceil(frames / stride)
