"""An existing cache: what its samples take, beside the estimate for them, and how they compress."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.codec import Codec
from shared.costs import VAE_RATES
from shared.errors import InputError
from shared.spec import Bucket, VaeGeometry
from shared.wording import counted
from storage_estimates.bits import Bits, BitsTable
from storage_estimates.config import EstimateConfig
from storage_estimates.estimate import Choice, Encoders, Group, estimate
from storage_estimates.presets import PRESETS
from storage_estimates.samples import Samples

_MAX_ASKED = 500
"""Shards whose size is asked of the store; of more, so many taken at random."""
_MAX_ROWS = 100_000
"""Rows of the index that are looked at; of more, so many taken at random."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredCache:
    """What a cache holds."""

    groups: tuple[Group, ...]
    encoders: Encoders
    choice: Choice
    """How most of its samples are stored."""
    bits: BitsTable
    actual_bytes: float
    """Of shards and index on the store."""

    def predicted_bytes(self) -> float:
        """Returns what the estimate gives for these samples."""
        return estimate(self.groups, self.encoders, self.choice, self.bits).total_bytes

    def error(self) -> float:
        """Returns by which part the prediction is too large."""
        return self.predicted_bytes() / self.actual_bytes - 1


def samples_of_cache(config: EstimateConfig) -> Samples:
    """Returns the samples of a cache, as many of them as --clips asks for."""
    assert config.cache is not None
    measured = measure(config.cache, vae_preset=config.vae_preset)
    note = (
        f"The cache as it is: {measured.actual_bytes:,.0f} bytes; the estimate for it: "
        f"{measured.predicted_bytes():,.0f} ({measured.error():+.2%})"
    )
    groups, notes = measured.groups, [note]
    preset = PRESETS[config.vae_preset]
    if measured.encoders.geometry != preset.geometry and config.vae_frames_per_second is None:
        notes.append(f"GPU hours are those of {preset.label}: give --vae-frames-per-second")
    if config.clips is not None:
        total = sum(group.num_samples for group in groups)
        groups = tuple(
            replace(group, num_samples=max(round(group.num_samples * config.clips / total), 1), shard_samples=None)
            for group in groups
        )
        notes.append(f"Its {counted(total, 'sample')} standing for {config.clips:,}")
    return Samples(
        groups=groups,
        bits=measured.bits,
        text_channels=measured.encoders.text_channels,
        max_tokens=measured.encoders.max_tokens,
        encoders=measured.encoders,
        choice=measured.choice,
        notes=tuple(notes),
    )


def measure(url: str, *, vae_preset: str = "sd") -> MeasuredCache:
    """Returns what a cache holds, and the bytes that it takes.

    Args:
        url: Its folder or URL.
        vae_preset: Whose rate bounds the shards of an extrapolation.

    Raises:
        InputError: if there is no cache, or it is empty.
    """
    cache = Cache.open(url)
    table = cache.read_index()
    if layout.TEXT_STREAM in table.column_names:
        table = table.filter(pc.is_valid(table[layout.TEXT_STREAM]))
    if layout.TEXT_STREAM not in table.column_names or not table.num_rows:
        raise InputError(f"{url}: the cache has no sample with latent and texts: encode some first")
    latent_shards, text_shards = _shards(table)
    rows = _some(table).to_pylist()
    scale = table.num_rows / len(rows)
    latent, text = cache.provenance[layout.LATENT_STREAM], cache.provenance[layout.TEXT_STREAM]
    encoders = Encoders(
        vae=str(latent["model"]) if "model" in latent else "the cache's",
        geometry=VaeGeometry.recorded(latent),
        text_channels=text["text_channels"],
        max_tokens=text.get("max_tokens", 120),
        pixels_per_second=VAE_RATES[vae_preset].per_second,
    )
    by_bucket = defaultdict(list)
    for row in rows:
        by_bucket[Bucket(row["num_frames"], row["height"], row["width"])].append(row)
    return MeasuredCache(
        groups=tuple(_group(bucket, members, latent_shards, scale) for bucket, members in sorted(by_bucket.items())),
        encoders=encoders,
        choice=_choice(rows, latent.get("posterior", "sample")),
        bits=_bits(rows, encoders.text_channels, url),
        actual_bytes=_sizes(cache, sorted(latent_shards | text_shards))
        + _sizes(cache, sorted(cache.index_files().paths())),
    )


def _shards(table: pa.Table) -> tuple[set[str], set[str]]:
    """Returns the shards that hold latents, and those that hold texts."""
    latents = pc.struct_field(table[layout.LATENT_STREAM], "shard")
    captions = pc.list_flatten(pc.struct_field(table[layout.TEXT_STREAM], "captions"))
    return set(latents.unique().to_pylist()), set(pc.struct_field(captions, "shard").unique().to_pylist())


def _some(table: pa.Table) -> pa.Table:
    """Returns at most so many rows of the index, taken at random."""
    if table.num_rows <= _MAX_ROWS:
        return table
    return table.take(sorted(random.Random(0).sample(range(table.num_rows), _MAX_ROWS)))


def _captions(rows: Sequence[Row]) -> list[Row]:
    """Returns the captions of some samples; of one that samples share, one place."""
    captions = (caption for row in rows for caption in row[layout.TEXT_STREAM]["captions"])
    return list({(caption["shard"], caption["offset"]): caption for caption in captions}.values())


def _group(bucket: Bucket, rows: Sequence[Row], shards: set[str], scale: float) -> Group:
    captions, num_samples = _captions(rows), round(len(rows) * scale)
    num_shards = sum(shard.startswith(f"{layout.SHARD_FOLDER}/{bucket}/") for shard in shards)
    columns = [
        json.dumps(row["manifest"], ensure_ascii=False, separators=(",", ":")) for row in rows if row.get("manifest")
    ]
    return Group(
        bucket=bucket,
        num_samples=num_samples,
        num_tokens=sum(caption["num_tokens"] for caption in captions) / len(captions),
        num_captions=len(captions) / len(rows),
        caption_characters=sum(len(caption["caption"].encode()) for caption in captions) / len(captions),
        source_characters=round(sum(len(row["source"].encode()) for row in rows) / len(rows)),
        manifest_bytes=round(sum(len(each.encode()) for each in columns) / len(rows)),
        shard_samples=num_samples / max(num_shards, 1),
    )


def _choice(rows: Sequence[Row], posterior: Any) -> Choice:
    latents = Counter(row[layout.LATENT_STREAM]["codec"] for row in rows)
    texts = Counter(caption["codec"] for row in rows for caption in row[layout.TEXT_STREAM]["captions"])
    containers = Counter(layout.container_of(row[layout.LATENT_STREAM]["shard"]) for row in rows)
    return Choice(
        latent_codec=Codec.parse(latents.most_common(1)[0][0]),
        text_codec=Codec.parse(texts.most_common(1)[0][0]),
        container=containers.most_common(1)[0][0],
        posterior=posterior,
    )


def _bits(rows: Sequence[Row], text_channels: int, url: str) -> BitsTable:
    """Returns the bits a value that each codec took in the cache."""
    num_bytes: Counter[tuple[Literal["latent", "text"], str]] = Counter()
    num_values: Counter[tuple[Literal["latent", "text"], str]] = Counter()
    for row in rows:
        latent = row[layout.LATENT_STREAM]
        channels, frames, height, width = latent["shape"]
        num_bytes["latent", latent["codec"]] += latent["bytes"]
        num_values["latent", latent["codec"]] += channels * frames * height * width
    for caption in _captions(rows):
        num_bytes["text", caption["codec"]] += caption["bytes"]
        num_values["text", caption["codec"]] += caption["num_tokens"] * text_channels
    return BitsTable(found={key: Bits(per_value=8 * num_bytes[key] / num_values[key], source=url) for key in num_bytes})


def _sizes(cache: Cache, paths: Sequence[str]) -> float:
    asked = list(paths) if len(paths) <= _MAX_ASKED else random.Random(0).sample(list(paths), _MAX_ASKED)
    return sum(cache.store.size(path) or 0 for path in asked) * len(paths) / max(len(asked), 1)
