"""Committing a shard exactly once.

The shard is written under a temporary name, made durable and renamed; then its index fragment, which names the shard,
is created only if no fragment of that shard's identity exists. A writer that dies before the fragment leaves an orphan
that nobody reads; of two writers of one shard the second's work is dropped.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from shared.cache import codecs, layout
from shared.cache.dataset import CommittedShard
from shared.cache.identity import text_id
from shared.cache.schema import INDEX, parquet_bytes
from shared.cache.tar import TarShardWriter
from shared.spec import Bucket
from shared.storage import durable_file, publish, temporary_path, write_if_absent


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One encoded clip in one bucket, and where it came from."""

    sample: str
    """Its identity, see ``shared.cache.identity.latent_id``."""
    source: str
    source_version: str
    bucket: Bucket
    frame_interval: int
    fps: float
    captions: tuple[str, ...]
    """As the manifest gives them."""
    cleaned_captions: tuple[str, ...]
    latent: torch.Tensor  # (C, T, H, W)
    texts: tuple[torch.Tensor, ...]  # one (L, D) a caption


class ShardWriter:
    """Collects encoded samples of one bucket into a shard; nothing is seen of it before :meth:`commit`.

    Use as a context manager, so that an error leaves no temporary file.

    Args:
        root: The cache's folder.
        shard_id: The shard's identity, from the samples that were planned for it.
        codec: For both streams, see ``shared.cache.codecs``.
        clips_root: The folder from which the samples' sources are taken; recorded for verification.
        environment: Recorded beside the shard: device, versions, micro-batch; what its bytes depend on.
    """

    def __init__(
        self,
        root: Path,
        *,
        shard_id: str,
        bucket: Bucket,
        codec: str,
        clips_root: Path,
        environment: dict[str, Any],
    ) -> None:
        self._root, self._shard_id, self._bucket, self._codec = root, shard_id, bucket, codec
        self._clips_root, self._environment = clips_root, environment
        self._temporary = temporary_path(root / layout.SHARD_FOLDER / str(bucket))
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> "ShardWriter":
        self._context = durable_file(self._temporary)
        self._tar = TarShardWriter(self._context.__enter__())
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._open:
            self._context.__exit__(kind, error, traceback)
            self._temporary.unlink(missing_ok=True)

    def add(self, sample: Sample) -> None:
        """Appends a sample."""
        assert sample.bucket == self._bucket, (sample.bucket, self._bucket)
        latent = {"codec": self._codec, "shape": list(sample.latent.shape)}
        text = {
            "codec": self._codec,
            "num_tokens": [len(embedding) for embedding in sample.texts],
            "channels": sample.texts[0].shape[1],
        }
        description = layout.sample_json(
            source=sample.source,
            captions=list(sample.captions),
            bucket=sample.bucket,
            fps=sample.fps,
            latent=latent,
            text=text,
        )
        extents = self._tar.add(
            sample.sample,
            {
                layout.LATENT_STREAM: codecs.encode(sample.latent, self._codec),
                layout.TEXT_STREAM: codecs.encode(torch.cat(sample.texts), self._codec),
                "json": description,
            },
        )
        places = {
            stream: {
                "offset": extents[stream].offset,
                "bytes": extents[stream].num_bytes,
                "crc32c": extents[stream].crc32c,
            }
            for stream in layout.STREAMS
        }
        statistics = sample.latent.float()
        self._rows.append(
            {
                "sample": sample.sample,
                "source": sample.source,
                "source_version": sample.source_version,
                "captions": list(sample.captions),
                "num_frames": sample.bucket.num_frames,
                "height": sample.bucket.height,
                "width": sample.bucket.width,
                "frame_interval": sample.frame_interval,
                "fps": sample.fps,
                "latent": {
                    **latent,
                    **places[layout.LATENT_STREAM],
                    "id": sample.sample,
                    "mean": statistics.mean((1, 2, 3)).tolist(),
                    "std": statistics.std((1, 2, 3)).tolist(),
                },
                "text.t5": {
                    **text,
                    **places[layout.TEXT_STREAM],
                    "ids": [text_id(caption) for caption in sample.cleaned_captions],
                },
            }
        )

    def commit(self) -> CommittedShard:
        """Makes the shard durable and visible. Without samples nothing is written."""
        sha256, num_bytes = self._tar.finish()
        self._context.__exit__(None, None, None)
        self._open = False
        if not self._rows:
            self._temporary.unlink()
            return CommittedShard(shard="", num_samples=0, num_bytes=0, created=False)
        name = layout.shard_object(self._bucket, self._shard_id, sha256)
        for row in self._rows:
            for stream in layout.STREAMS:
                row[stream]["shard"] = name
        publish(self._temporary, self._root / name)
        record = {
            "format_version": "1",
            "shard": name,
            "shard_bytes": str(num_bytes),
            "shard_sha256": sha256,
            "clips_root": str(self._clips_root),
            "environment": json.dumps(self._environment, sort_keys=True),
        }
        fragment = self._root / layout.INDEX_FOLDER / f"{self._shard_id}.parquet"
        created = write_if_absent(fragment, parquet_bytes(pa.Table.from_pylist(self._rows, schema=INDEX), record))
        if not created and _shard_of(fragment) != name:
            (self._root / name).unlink()
        return CommittedShard(shard=name, num_samples=len(self._rows), num_bytes=num_bytes, created=created)


def _shard_of(fragment: Path) -> str:
    return pq.read_metadata(fragment).metadata[b"shard"].decode()
