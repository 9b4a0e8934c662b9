"""Names inside a cache, the JSON beside every sample, and the bytes that all of it takes. Pure: no torch, no pyarrow.

The writer and the estimator both use these, so that a predicted size is the written one.
"""

import json
from typing import Any

from shared.spec import Bucket

DATASET_FILE = "dataset.json"
SHARD_FOLDER = "shards"
INDEX_FOLDER = "index"
LEDGER_FOLDER = "refused"

LATENT_STREAM = "latent"
TEXT_STREAM = "text.t5"
STREAMS = (LATENT_STREAM, TEXT_STREAM)
"""The streams of a sample, in the order of their members in a tar shard; ``json`` follows them."""

_TAR_BLOCK = 512
_TAR_RECORD = 10_240

INDEX_FRAGMENT_BYTES = 11_000
"""A Parquet fragment before its first row: schema, statistics and metadata. Measured; a test compares."""
INDEX_ROW_BYTES = 220
"""A row of a fragment, compressed: identities and checksums do not compress. Measured likewise."""


def shard_object(bucket: Bucket, shard_id: str, sha256: str) -> str:
    """Returns the path, below the cache's folder, of a tar shard: its identity, then a hash of its bytes."""
    return f"{SHARD_FOLDER}/{bucket}/{shard_id}-{sha256[:16]}.tar"


def sample_json(
    *,
    source: str,
    captions: list[str],
    bucket: Bucket,
    fps: float,
    latent: dict[str, Any],
    text: dict[str, Any],
) -> bytes:
    """Returns the JSON member of a sample: what a reader without the index needs to decode the other members.

    Args:
        source: The clip's path as the manifest gives it.
        captions: As the manifest gives them.
        bucket: The sample's size before the VAE.
        fps: Frames a second of the sample's frames.
        latent: ``codec`` and ``shape`` (C, T, H, W).
        text: ``codec``, ``num_tokens`` (one entry a caption) and ``channels``.
    """
    value = {
        "source": source,
        "captions": captions,
        "num_frames": bucket.num_frames,
        "height": bucket.height,
        "width": bucket.width,
        "fps": fps,
        LATENT_STREAM: latent,
        TEXT_STREAM: text,
    }
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def tar_member_bytes(payload_bytes: int) -> int:
    """Returns what one member takes in a tar: its header and its payload in whole blocks."""
    return _TAR_BLOCK + -(-payload_bytes // _TAR_BLOCK) * _TAR_BLOCK


def tar_bytes(total_member_bytes: int) -> int:
    """Returns the size of a tar whose members take ``total_member_bytes``: two zero blocks, then whole records."""
    return -(-(total_member_bytes + 2 * _TAR_BLOCK) // _TAR_RECORD) * _TAR_RECORD
