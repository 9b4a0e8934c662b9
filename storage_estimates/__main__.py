"""``python -m storage_estimates``: parse, compute, print. Starts in a moment: imports neither torch nor pyarrow."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from shared.errors import InputError, run_entry_point
from shared.spec import Bucket, VaeGeometry
from storage_estimates.estimate import SampleShape, payload_bytes, tar_sample_bytes
from storage_estimates.report import Row, as_json, table, terabytes


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    """What a cache of T5 embeddings and VAE latents takes on disk.

    Describe the samples, or give --cache to compare an existing cache with its estimate. Defaults are Open-Sora's
    models: T5 v1.1-XXL (4096 channels) and the Stable Diffusion VAE (4 channels, 8x8 pixels a latent).
    """

    clips: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Samples to store, e.g. 10_000_000."""
    frames: int = 16
    """Frames a sample."""
    size: str = "256"
    """Pixels: one number for a square, or HEIGHTxWIDTH."""
    tokens: int = 120
    """T5 tokens that a caption may have at most."""
    mean_tokens: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """T5 tokens that captions have on average. Without it: half of --tokens."""

    text_channels: int = 4096
    """Width of a text embedding."""
    latent_channels: int = 4
    """Channels of the VAE's latent."""
    spatial_stride: int = 8
    """Pixels a latent value, along each side."""
    temporal_stride: int = 1
    """Frames a latent frame: 1 for image VAEs."""
    shard_samples: int = 64
    """Samples a shard."""

    cache: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """An existing cache: its bytes on disk beside its estimate."""
    json: bool = False
    """Print JSON."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        if (self.clips is None) == (self.cache is None):
            raise InputError("expected one of --clips N and --cache FOLDER")
        for name in ("clips", "frames", "tokens", "text_channels", "latent_channels", "spatial_stride"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")
        for name in ("temporal_stride", "shard_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if self.mean_tokens is not None and not 0 < self.mean_tokens <= self.tokens:
            raise InputError(
                f"--mean-tokens {self.mean_tokens}: expected more than 0 and at most --tokens {self.tokens}"
            )

    def bucket(self) -> Bucket:
        """Returns the size of a sample."""
        height, _, width = self.size.partition("x")
        try:
            return Bucket(self.frames, int(height), int(width or height))
        except ValueError:
            raise InputError(f"--size {self.size!r}: expected a number of pixels or HEIGHTxWIDTH") from None


def estimate_rows(config: EstimateConfig) -> list[Row]:
    """Returns ways of storing the same samples, the published arithmetic first."""
    assert config.clips is not None
    vae = VaeGeometry(
        latent_channels=config.latent_channels,
        spatial_stride=config.spatial_stride,
        temporal_stride=config.temporal_stride,
    )
    mean = config.tokens / 2 if config.mean_tokens is None else config.mean_tokens
    padded, unpadded = (
        SampleShape(bucket=config.bucket(), vae=vae, text_channels=config.text_channels, num_tokens=tokens)
        for tokens in (float(config.tokens), mean)
    )
    codec_rows = {
        "float32 latents, padded text": payload_bytes(padded, latent_codec="float32", text_codec="bfloat16"),
        "bfloat16 latents, padded text": payload_bytes(padded, latent_codec="bfloat16", text_codec="bfloat16"),
        f"bfloat16, {mean:g} tokens unpadded": payload_bytes(unpadded, latent_codec="bfloat16", text_codec="bfloat16"),
        "the same in a cache": tar_sample_bytes(unpadded, codec="bfloat16", shard_samples=config.shard_samples),
    }
    return [Row(name=name, sample=sample, num_samples=config.clips) for name, sample in codec_rows.items()]


def main() -> int:
    """Prints the estimate."""
    config = tyro.cli(EstimateConfig, prog="python -m storage_estimates")
    if config.cache is not None:
        return _compare(config)
    rows = estimate_rows(config)
    if config.json:
        print(json.dumps(as_json(rows), indent=2))
        return 0
    print(
        f"{config.clips:,} samples of {config.bucket()}, captions of up to {config.tokens} tokens. Bytes of a sample:\n"
    )
    print(table(rows))
    print(
        "\nThe first row is the published arithmetic: text in 16 bits, padded to the limit; latents in float32."
        "\nThe last row is what preprocess writes by default: tar headers, sample descriptions and index included."
    )
    return 0


def _compare(config: EstimateConfig) -> int:
    from storage_estimates.measure import bytes_on_disk, measure  # pyarrow: half a second that others need not wait

    assert config.cache is not None
    buckets = measure(config.cache)
    actual, predicted = bytes_on_disk(config.cache), sum(bucket.predicted_bytes() for bucket in buckets)
    error = predicted / actual - 1
    if config.json:
        print(json.dumps({"predicted_bytes": round(predicted), "actual_bytes": actual, "error": error}))
        return 0
    for bucket in buckets:
        print(
            f"{bucket.shape.bucket}: {bucket.num_samples:,} samples in {bucket.num_shards:,} shards, "
            f"{bucket.shape.num_captions:.2f} captions of {bucket.shape.num_tokens:.1f} tokens, {bucket.codec}"
        )
    print(f"predicted {round(predicted):,} bytes ({terabytes(predicted)}), on disk {actual:,}: {error:+.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
