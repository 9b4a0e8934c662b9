"""Bytes of samples and shards, from a cache's provenance. Pure."""

from shared.cache.dataset import Provenance
from shared.cache.layout import LATENT_STREAM
from shared.clips.options import EncodingOptions
from shared.codec import raw_bytes
from shared.errors import InputError
from shared.shard_size import most_samples_a_shard, samples_a_shard
from shared.spec import Bucket, VaeGeometry, latent_shape


def latent_bytes(config: EncodingOptions, bucket: Bucket, provenance: Provenance) -> int:
    """Returns the bytes of a latent before entropy coding.

    Raises:
        InputError: if the autoencoder does not take the bucket.
    """
    channels, *rest = latent_shape(bucket, VaeGeometry.recorded(provenance[LATENT_STREAM]))
    stored = channels * (2 if config.posterior == "mean+logvar" else 1)
    return raw_bytes(config.codecs()[LATENT_STREAM], (stored, *rest))


def text_bytes(config: EncodingOptions, provenance: Provenance) -> int:
    """Returns the bytes of a caption's embedding before entropy coding, if it has all tokens."""
    text = provenance[config.text_stream]
    return raw_bytes(config.codecs()[config.text_stream], (text["max_tokens"], text["text_channels"]))


def sample_bytes(config: EncodingOptions, bucket: Bucket, num_captions: int, provenance: Provenance) -> int:
    """Returns the bytes of a sample before entropy coding, its texts of all their tokens if they are not shared."""
    texts = 0 if config.share_text else num_captions * text_bytes(config, provenance)
    return latent_bytes(config, bucket, provenance) + texts


def shard_samples(config: EncodingOptions, bucket: Bucket, provenance: Provenance) -> int:
    """Returns how many samples of a bucket a shard has at most.

    Raises:
        InputError: if shards of as many as were asked for would be too large.
    """
    limits = {
        "sample_bytes": sample_bytes(config, bucket, 1, provenance),
        "sample_pixels": bucket.num_frames * bucket.height * bucket.width,
    }
    if config.shard_samples is None:
        return samples_a_shard(**limits)
    most = most_samples_a_shard(**limits)
    if config.shard_samples > most:
        raise InputError(
            f"--shard-samples {config.shard_samples}: shards of bucket {bucket} would exceed 1 GB or three minutes of "
            f"a GPU: expected at most {most}"
        )
    return config.shard_samples
