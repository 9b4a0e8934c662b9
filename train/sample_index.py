"""The samples of a cache that a run trains on, checked against the cache's provenance."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shared.cache.dataset import Cache
from shared.cache.fragments import read_rows
from shared.cache.layout import LATENT_STREAM, TEXT_STREAM
from shared.cache.resolve import resolve
from shared.cache.schema import ABOUT, MANIFEST
from shared.errors import InputError
from shared.spec import Bucket, VaeGeometry, latent_shape
from train.bucket_walk import BucketRows
from train.index_build import build_columns, index_paths
from train.index_columns import IndexColumns, IndexFolder, build_once, node_folder
from train.where import Where, held_out, parse_fraction

LATENT, TEXT = LATENT_STREAM, TEXT_STREAM

RUN_BYTES = 8 * 1024 * 1024
"""About how much is fetched by one read: enough for a disk or a bucket to deliver at its full rate."""
MAX_RUN_SAMPLES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which rows of the index are used."""

    where: str | None = None
    """A condition, see :class:`train.where.Where`."""
    holdout: str | None = None
    """The part of the sources that is held out, e.g. ``1%``."""
    held_out_side: bool = False
    """Take what is held out, not the rest."""


class SampleIndex:
    """The samples, as columns that the processes of a node share. Build it with :meth:`open`."""

    def __init__(self, cache: Cache, folder: IndexFolder) -> None:
        self.cache, self.folder = cache, folder
        about = folder.about()
        latent, text = cache.provenance[LATENT], cache.provenance[TEXT]
        self.geometry = VaeGeometry(
            latent_channels=latent["latent_channels"],
            spatial_stride=latent["spatial_stride"],
            temporal_stride=latent["temporal_stride"],
        )
        self.moments: bool = latent.get("posterior") == "mean+logvar"
        self.caption_channels: int = text["text_channels"]
        self.max_tokens: int = text["max_tokens"]
        self.shards: list[str] = about["shards"]
        self.codecs: list[str] = about["codecs"]
        self.digest: str = about["digest"]
        self.buckets: dict[Bucket, BucketRows] = {}
        self._fps: dict[Bucket, float] = {}
        for entry in about["buckets"]:
            bucket = Bucket.parse(entry["bucket"])
            run_samples = min(max(1, round(about["run_bytes"] / entry["mean_bytes"])), MAX_RUN_SAMPLES)
            self.buckets[bucket] = BucketRows(
                first_row=entry["first_row"], num_samples=entry["num_samples"], run_samples=run_samples
            )
            self._fps[bucket] = entry["fps"]
            self._check_latents(bucket, tuple(entry["latent_shape"]))

    @classmethod
    def open(
        cls,
        cache: Cache,
        selection: Selection | None = None,
        *,
        local_cache: Path | None = None,
        run_bytes: int = RUN_BYTES,
    ) -> "SampleIndex":
        """Returns the index; the first process of a node to ask builds it.

        Args:
            cache: Where the samples are.
            selection: Which of them; all by default.
            local_cache: A folder of this node; the system's temporary one by default.
            run_bytes: About how much is fetched by one read.

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
            "run_bytes": run_bytes,
        }

        def build() -> tuple[IndexColumns, dict[str, Any]]:
            table = _read_rows(cache, paths, selection)
            _check_texts(cache, table)
            built = build_columns(table, TEXT)
            del table
            pa.default_memory_pool().release_unused()
            return built.columns, {
                "shards": built.shards,
                "codecs": built.codecs,
                "buckets": built.buckets,
                "digest": built.digest,
                "run_bytes": run_bytes,
            }

        return cls(cache, build_once(node_folder(local_cache), made_from, build))

    @property
    def num_samples(self) -> int:
        """Samples of all buckets."""
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
                f"{self.cache.url}: the latents of bucket {bucket} have shape {found}, expected {expected}: "
                "run preprocess.verify"
            )


def _read_rows(cache: Cache, paths: list[str], selection: Selection) -> pa.Table:
    """Returns the rows that a selection takes, with the columns that building needs."""
    where = Where(selection.where) if selection.where else None
    columns = ["sample", "removed", "latent.generation", f"{TEXT}.generation", *index_paths(TEXT)]
    columns += where.paths if where else []
    columns += ["source"] if selection.holdout else []
    table = resolve(read_rows(cache.store, paths, list(dict.fromkeys(columns))))
    if not table.num_rows:
        raise InputError(f"{cache.url}: the cache holds no sample: run preprocess into it first")
    if where:
        table = _filtered(table, where.select(table, _known_columns(cache, paths)))
        if not table.num_rows:
            raise InputError(f"{cache.url}: no sample fulfils --where {selection.where!r}: ask for less")
    if selection.holdout:
        out = held_out(table["source"], parse_fraction(selection.holdout))
        table = _filtered(table, pa.array(out if selection.held_out_side else ~out))
        if not table.num_rows:
            side = "held out" if selection.held_out_side else "left to train on"
            raise InputError(f"{cache.url}: --holdout {selection.holdout}: no sample is {side}: take another part")
    return table


def _filtered(table: pa.Table, chosen: pa.Array) -> pa.Table:
    return table if pc.all(chosen).as_py() else table.filter(chosen)


def _known_columns(cache: Cache, paths: list[str]) -> Callable[[], list[str]]:
    def read() -> list[str]:
        schema = read_rows(cache.store, paths, ["sample", MANIFEST]).schema
        own = [field.name for field in schema.field(MANIFEST).type] if MANIFEST in schema.names else []
        return ["sample", *ABOUT.names, *own]

    return read


def _check_texts(cache: Cache, table: pa.Table) -> None:
    provenance = cache.provenance[TEXT]
    if TEXT not in table.column_names:
        raise InputError(f"{cache.url}: no sample has texts of stream {TEXT!r}: run preprocess into it again")
    structs = table[TEXT].combine_chunks()
    channels = pc.unique(pc.struct_field(structs, "channels")).drop_null().to_pylist()
    if channels not in ([provenance["text_channels"]], []):
        raise InputError(
            f"{cache.url}: caption embeddings of {channels} channels, but text_channels="
            f"{provenance['text_channels']} in its provenance: run preprocess.verify"
        )
    tokens = pc.struct_field(pc.struct_field(structs, "captions").flatten(), "num_tokens")
    if len(tokens) and (pc.min(tokens).as_py() < 1 or pc.max(tokens).as_py() > provenance["max_tokens"]):
        raise InputError(
            f"{cache.url}: expected captions of 1 to {provenance['max_tokens']} tokens: run preprocess.verify"
        )
