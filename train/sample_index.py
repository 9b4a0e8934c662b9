"""The samples of a cache that a run trains on, checked against the cache's provenance."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from shared.cache.dataset import Cache, Provenance
from shared.cache.layout import LATENT_STREAM, TEXT_STREAM
from shared.cache.live import find_live
from shared.errors import InputError
from shared.spec import Bucket, VaeGeometry, latent_shape
from train.bucket_walk import BucketRows
from train.chosen_rows import Selection as Selection
from train.chosen_rows import choose_rows
from train.index_build import build_columns
from train.index_columns import IndexFolder, build_once, node_folder
from train.variants import ClipGroup

Variants = Literal["one", "all"]

LATENT, TEXT = LATENT_STREAM, TEXT_STREAM

RUN_BYTES = 8 * 1024 * 1024
"""About how much is fetched by one read, in bfloat16: enough for a disk or a bucket to deliver at its full rate."""
MAX_RUN_SAMPLES = 4096


def samples_a_run(latent_shape: Sequence[int], text_shape: tuple[int, int], run_bytes: int = RUN_BYTES) -> int:
    """Returns how many samples are read together: by their shapes alone, so that the plan of a run is the same whatever
    codec stored them, and also where they are encoded online.

    Args:
        latent_shape: As stored.
        text_shape: Most tokens of a caption, and channels.
        run_bytes: About how much is fetched by one read, in bfloat16.
    """
    sample_bytes = 2 * (math.prod(latent_shape) + math.prod(text_shape))
    return min(max(1, round(run_bytes / sample_bytes)), MAX_RUN_SAMPLES)


class IndexedSamples:
    """The samples that a run trains on, as columns that the processes of a node share.

    Args:
        url: Where they come from, for messages.
        provenance: Of their streams.
        folder: The columns.
    """

    def __init__(self, url: str, provenance: Provenance, folder: IndexFolder) -> None:
        self.url, self.provenance, self.folder = url, provenance, folder
        about = folder.about()
        latent, text = provenance[LATENT], provenance[TEXT]
        self.geometry = VaeGeometry.recorded(latent)
        self.moments: bool = latent.get("posterior") == "mean+logvar"
        self.caption_channels: int = text["text_channels"]
        self.max_tokens: int = text["max_tokens"]
        self.digest: str = about["digest"]
        text_shape = (self.max_tokens, self.caption_channels)
        self.buckets: dict[Bucket, BucketRows] = {}
        self._fps: dict[Bucket, float] = {}
        for entry in about["buckets"]:
            bucket = Bucket.parse(entry["bucket"])
            groups = tuple(ClipGroup(**group) for group in entry["groups"])
            self.buckets[bucket] = BucketRows(
                first_row=entry["first_row"],
                num_samples=sum(group.num_clips for group in groups),
                run_samples=samples_a_run(entry["latent_shape"], text_shape, about["run_bytes"]),
                groups=groups,
            )
            self._fps[bucket] = entry["fps"]
            self._check_latents(bucket, tuple(entry["latent_shape"]))

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, of all buckets."""
        return sum(rows.num_samples for rows in self.buckets.values())

    def latent_size(self, bucket: Bucket) -> tuple[int, int, int]:
        """Returns the frames, rows and columns of a bucket's latents."""
        return latent_shape(bucket, self.geometry)[1:]

    def stored_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """Returns the shape of a bucket's latents as they are stored: (C, T, H, W), or (2C, T, H, W) of moments."""
        channels, *size = latent_shape(bucket, self.geometry)
        return (channels * 2 if self.moments else channels, size[0], size[1], size[2])

    def fps(self, bucket: Bucket) -> float:
        """Returns the median frame rate of a bucket's samples."""
        return self._fps[bucket]

    def _check_latents(self, bucket: Bucket, found: tuple[int, ...]) -> None:
        expected = self.stored_shape(bucket)
        if found != expected:
            raise InputError(
                f"{self.url}: the latents of bucket {bucket} have shape {found}, expected {expected}: "
                "run preprocess.verify"
            )


class SampleIndex(IndexedSamples):
    """The samples of a cache. Build it with :meth:`open`."""

    def __init__(self, cache: Cache, folder: IndexFolder) -> None:
        super().__init__(cache.url, cache.provenance, folder)
        about = folder.about()
        self.cache = cache
        self.shards: list[str] = about["shards"]
        self.codecs: list[str] = about["codecs"]

    @classmethod
    def open(
        cls,
        cache: Cache,
        selection: Selection | None = None,
        *,
        variants: Variants = "one",
        local_cache: Path | None = None,
        run_bytes: int = RUN_BYTES,
    ) -> "SampleIndex":
        """Returns the index; the first process of a node to ask builds it.

        Args:
            cache: Where the samples are.
            selection: Which of them; all by default.
            variants: What an epoch takes of a clip that has several windows, or mirrored ones: one of them, another
                one each epoch, or all, each as a sample of its own.
            local_cache: A folder of this node; the system's temporary one by default.
            run_bytes: About how much is fetched by one read, in bfloat16.

        Raises:
            InputError: if the cache holds no sample, or samples that its provenance does not allow.
        """
        selection = selection or Selection()
        for stream in (LATENT, TEXT):
            if stream not in cache.provenance:
                held = ", ".join(cache.provenance)
                raise InputError(f"{cache.url}: the cache has no stream {stream!r}, only {held}: encode it first")
        paths = cache.index_files().paths()
        made_from = {
            "cache": cache.url,
            "provenance": cache.provenance,
            "files": paths,
            "where": selection.where,
            "holdout": selection.holdout,
            "held_out_side": selection.held_out_side,
            "variants": variants,
            "run_bytes": run_bytes,
        }

        def build(folder: Path) -> dict[str, Any]:
            live = find_live(cache, paths)
            pa.default_memory_pool().release_unused()
            positions = choose_rows(cache, live, selection)
            if TEXT not in live.schema.names:
                raise InputError(f"{cache.url}: no sample has texts of stream {TEXT!r}: run preprocess into it again")
            built = build_columns(cache, live, positions, TEXT, folder, by_clip=variants == "one")
            return {**asdict(built), "run_bytes": run_bytes}

        return cls(cache, build_once(node_folder(local_cache), made_from, build))
