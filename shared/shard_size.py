"""How many samples go into a shard. Pure; used by the planner and by the estimator."""

from shared.costs import VAE_RATES

MAX_SHARD_BYTES = 1_000_000_000
MAX_GPU_SECONDS = 180.0
_USUAL_SHARD_BYTES = 256_000_000
_USUAL_GPU_SECONDS = 60.0
_USUAL_SAMPLES = 512

_SD_PIXELS_PER_SECOND = VAE_RATES["sd"].per_second


def samples_a_shard(*, sample_bytes: int, sample_pixels: int, pixels_per_second: float = _SD_PIXELS_PER_SECOND) -> int:
    """Returns how many samples go into a shard unless the user says otherwise.

    A shard is what a killed worker loses, and one file: as many samples as take 256 MB before entropy coding, or one
    minute of a GPU, but at most 512.

    Args:
        sample_bytes: Before entropy coding, with a caption of all tokens.
        sample_pixels: Height x width x frames.
        pixels_per_second: Of the autoencoder on one GPU; by default Stable Diffusion's on an H200.
    """
    return _within(
        _USUAL_SHARD_BYTES / sample_bytes, _USUAL_GPU_SECONDS * pixels_per_second / sample_pixels, _USUAL_SAMPLES
    )


def most_samples_a_shard(
    *, sample_bytes: int, sample_pixels: int, pixels_per_second: float = _SD_PIXELS_PER_SECOND
) -> int:
    """Returns how many samples a shard may have: 1 GB, or three minutes of a GPU. Arguments as above."""
    return _within(MAX_SHARD_BYTES / sample_bytes, MAX_GPU_SECONDS * pixels_per_second / sample_pixels)


def _within(*limits: float) -> int:
    return max(1, int(min(limits)))
