"""An existing cache: the bytes that it takes, beside the bytes that the estimate gives for its samples."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from shared.cache.dataset import Cache
from shared.cache.layout import LATENT_STREAM, TEXT_STREAM
from shared.spec import Bucket, VaeGeometry
from storage_estimates.estimate import SampleShape, tar_sample_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredBucket:
    """The samples of one bucket in a cache."""

    shape: SampleShape
    num_samples: int
    num_shards: int
    codec: str

    def predicted_bytes(self) -> float:
        """Returns what the estimate gives for these samples."""
        sample = tar_sample_bytes(
            self.shape,
            codec=self.codec,  # type: ignore[arg-type]
            shard_samples=self.num_samples / self.num_shards,
        )
        return sample.total * self.num_samples


def bytes_on_disk(root: Path) -> int:
    """Returns the bytes of all files under a cache's folder."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def measure(root: Path) -> list[MeasuredBucket]:
    """Returns what a cache holds, by bucket.

    Raises:
        InputError: if there is no cache.
    """
    cache = Cache.open(root)
    latent, text = cache.provenance[LATENT_STREAM], cache.provenance[TEXT_STREAM]
    vae = VaeGeometry(
        latent_channels=latent["latent_channels"],
        spatial_stride=latent["spatial_stride"],
        temporal_stride=latent["temporal_stride"],
    )
    by_bucket = defaultdict(list)
    for row in cache.read_index().to_pylist():
        by_bucket[Bucket(row["num_frames"], row["height"], row["width"])].append(row)
    measured = []
    for bucket, rows in sorted(by_bucket.items()):
        tokens = [count for row in rows for count in row[TEXT_STREAM]["num_tokens"]]
        measured.append(
            MeasuredBucket(
                shape=SampleShape(
                    bucket=bucket,
                    vae=vae,
                    text_channels=text["text_channels"],
                    num_tokens=sum(tokens) / len(tokens),
                    num_captions=len(tokens) / len(rows),
                ),
                num_samples=len(rows),
                num_shards=len({row[LATENT_STREAM]["shard"] for row in rows}),
                codec=rows[0][LATENT_STREAM]["codec"],
            )
        )
    return measured
