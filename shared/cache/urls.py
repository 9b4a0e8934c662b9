"""The committed shards of a cache for readers that know nothing of its index."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.cache.inventory import take_inventory
from shared.errors import InputError
from shared.spec import Bucket
from shared.wording import counted


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveShard:
    """A shard with latents that count."""

    url: str
    """An absolute path, or the object's URL."""
    bucket: Bucket
    num_samples: int
    """That are live."""
    num_dead: int
    """Samples in the shard that were removed or encoded again: a plain reader gets them too."""
    num_without_text: int
    """Live samples some of whose texts lie in another shard: they were encoded again, or are shared."""
    num_bytes: int

    def json(self) -> str:
        """Returns the shard as a line of JSON."""
        return json.dumps(
            {
                "url": self.url,
                "bucket": str(self.bucket),
                "samples": self.num_samples,
                "dead_samples": self.num_dead,
                "samples_without_text": self.num_without_text,
                "bytes": self.num_bytes,
            }
        )


def live_shards(cache: Cache, bucket: Bucket | None = None) -> list[LiveShard]:
    """Returns the shards with live latents, by bucket and name.

    Args:
        cache: Opened.
        bucket: Only of this one.

    Raises:
        InputError: if the index cannot be read, or does not say of each shard what it is.
    """
    inventory = take_inventory(cache, cache.index_files())
    by_shard = inventory.positions_by_shard(inventory.latent_shard)
    shards = []
    for shard, positions in by_shard.items():
        found = Bucket.parse(shard.split("/")[1])
        if bucket is not None and found != bucket:
            continue
        if shard not in inventory.records:
            raise InputError(f"{cache.url}/{shard}: rows name it, no fragment does: run preprocess.verify")
        record = inventory.records[shard]
        apart = np.zeros(len(positions), bool)
        for codes in inventory.text_shard.values():
            apart |= (codes[positions] >= 0) & (codes[positions] != inventory.latent_shard[positions])
        shards.append(
            LiveShard(
                url=str(cache.store.local_path(shard) or f"{cache.url}/{shard}"),
                bucket=found,
                num_samples=len(positions),
                num_dead=(record.num_samples or len(positions)) - len(positions),
                num_without_text=int(apart.sum()),
                num_bytes=record.num_bytes,
            )
        )
    return sorted(shards, key=lambda shard: (shard.bucket, shard.url))


def warnings(shards: Sequence[LiveShard]) -> list[str]:
    """Returns what a reader without the index should know of these shards, one line each."""
    lines = []
    if dead := sum(shard.num_dead for shard in shards):
        lines.append(
            f"{counted(dead, 'sample')} in these shards removed or encoded again: take those only that the index names"
        )
    if apart := sum(shard.num_without_text for shard in shards):
        lines.append(
            f"{counted(apart, 'sample')} with texts in other shards, under {layout.SHARD_FOLDER}/<stream>: read the "
            "index"
        )
    if any(layout.container_of(shard.url) == "zarr" for shard in shards):
        lines.append("Zarr shards are among them, which WebDataset readers do not read: see docs/zarr.md")
    return lines
