"""Small caches with random content, written by the real writer."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shared.cache.commit import ShardWriter
from shared.cache.dataset import Cache, Provenance
from shared.cache.identity import latent_id, shard_id, text_id
from shared.cache.layout import Container
from shared.cache.rows import Sample, Text, sample_row, text_row
from shared.codec import Codec
from shared.spec import Bucket

CHANNELS, TEXT_CHANNELS, MAX_TOKENS, STRIDE = 4, 16, 10, 8


def provenance(posterior: str = "sample") -> Provenance:
    return {
        "latent": {
            "model": "none",
            "weights_sha256": "latent weights",
            "precision": "float32",
            "latent_channels": CHANNELS,
            "spatial_stride": STRIDE,
            "temporal_stride": 1,
            "scaling_factor": 1.0,
            "shift_factor": 0.0,
            "posterior": posterior,
        },
        "text.t5": {
            "model": "none",
            "weights_sha256": "text weights",
            "precision": "float32",
            "text_channels": TEXT_CHANNELS,
            "max_tokens": MAX_TOKENS,
            "cleaning": "none",
        },
    }


def write_cache(
    root: Path | str,
    samples: Mapping[Bucket, int],
    *,
    captions_per_sample: int = 1,
    latent_channels: int = CHANNELS,
    seed: int = 0,
    codecs: tuple[str, str] = ("bfloat16", "bfloat16"),
    container: Container = "tar",
    samples_per_shard: int = 1000,
    posterior: str = "sample",
    manifest: Mapping[str, list[Any]] | None = None,
    new_texts: bool = False,
    clips_per_source: int = 1,
    views: Sequence[Sequence[tuple[int, bool]]] | None = None,
    fps: Sequence[float] = (8.0,),
    latent_scale: float = 1.0,
) -> Cache:
    """Writes random samples.

    Args:
        root: A folder or a URL.
        samples: How many by bucket.
        captions_per_sample: Each with its own embedding.
        latent_channels: May be others than the provenance says.
        seed: Of the content.
        codecs: Of latents and of texts.
        container: Tar or Zarr.
        samples_per_shard: Shards hold one bucket.
        posterior: For the provenance.
        manifest: The manifest's other columns: a value for each sample of a bucket, taken in turn.
        new_texts: Then encode every sample's texts again, into a shard of their own.
        clips_per_source: Samples of one source.
        views: Windows (their numbers) of a clip and whether they are mirrored, taken in turn by the clips; ``samples``
            then counts clips, and a shard holds one window, mirrored or not. Without them no column says so.
        fps: Of samples of a bucket, taken in turn.
        latent_scale: Of the latents' standard deviation.
    """
    cache = Cache.open_or_create(root, provenance(posterior))
    parsed = {"latent": Codec.parse(codecs[0]), "text.t5": Codec.parse(codecs[1])}
    generator = torch.Generator().manual_seed(seed)
    for bucket, view, clips in _families(samples, views):
        made, columns = [], []
        for i in clips:
            name = f"{bucket}-{seed}-{i}" + ("" if view is None else f"-{view}")
            sample = _sample(name, bucket, generator, captions_per_sample, latent_channels)
            object.__setattr__(sample, "latent", sample.latent * latent_scale)
            object.__setattr__(sample, "fps", fps[i % len(fps)])
            object.__setattr__(sample, "source", f"{bucket}-{seed}-{i // clips_per_source}.mp4")
            object.__setattr__(sample, "manifest", {k: v[i % len(v)] for k, v in (manifest or {}).items()})
            made.append(sample)
            columns.append({} if view is None else {"window": view[0] * (3 + i % 4), "flip": view[1]})
        for start in range(0, len(made), samples_per_shard):
            part = made[start : start + samples_per_shard]
            ids = [sample.sample for sample in part]
            with ShardWriter(
                cache.store,
                shard_id=shard_id(ids, streams=parsed),
                folder=str(bucket),
                container=container,
                record={"environment": {}},
            ) as writer:
                for sample, more in zip(part, columns[start:], strict=False):
                    row, arrays = sample_row(sample, parsed, 0)
                    writer.add(row | more, arrays)
                writer.commit()
        if new_texts:
            ids = [sample.sample for sample in made]
            with ShardWriter(
                cache.store,
                shard_id=shard_id(ids, streams=["text.t5"], generation=1),
                folder="text.t5",
                container=container,
                record={"environment": {}},
            ) as writer:
                for sample in reversed(made):
                    texts = _texts(f"{sample.sample}, told anew", generator, captions_per_sample)
                    writer.add(*text_row(sample.sample, "text.t5", texts, parsed["text.t5"], 1))
                writer.commit()
    return cache


def _families(
    samples: Mapping[Bucket, int], views: Sequence[Sequence[tuple[int, bool]]] | None
) -> Iterator[tuple[Bucket, tuple[int, bool] | None, list[int]]]:
    """Yields what lies in the same shards: a bucket, a view, and the clips that have it."""
    for bucket, count in samples.items():
        if views is None:
            yield bucket, None, list(range(count))
            continue
        for view in sorted({view for some in views for view in some}):
            yield bucket, view, [i for i in range(count) if view in views[i % len(views)]]


def _sample(name: str, bucket: Bucket, generator: torch.Generator, num_captions: int, channels: int) -> Sample:
    size = (channels, bucket.num_frames, bucket.height // STRIDE, bucket.width // STRIDE)
    return Sample(
        sample=latent_id(source=name, source_version="1", bucket=bucket, frame_interval=1),
        source=name,
        source_version="1",
        bucket=bucket,
        frame_interval=1,
        fps=8.0,
        latent=torch.randn(size, generator=generator),
        texts={"text.t5": _texts(name, generator, num_captions)},
    )


def _texts(name: str, generator: torch.Generator, count: int) -> list[Text]:
    lengths = torch.randint(1, MAX_TOKENS + 1, (count,), generator=generator).tolist()
    captions = [f"{name}, told in way {k}" for k in range(count)]
    return [
        Text(id=text_id(caption), caption=caption, embedding=torch.randn(length, TEXT_CHANNELS, generator=generator))
        for caption, length in zip(captions, lengths, strict=True)
    ]
