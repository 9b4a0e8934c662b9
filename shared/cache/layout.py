"""Names inside a cache, the JSON beside every sample, and the bytes that all of it takes. Pure: no torch, no pyarrow.

The writer and the estimator both use these, so that a predicted size is the written one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from shared.errors import InputError

DATASET_FILE = "dataset.json"
CARD_FILE = "README.md"
STREAM_FOLDER = "streams"
NULL_FOLDER = "null"
SHARD_FOLDER = "shards"
INDEX_FOLDER = "index"
SNAPSHOT_FOLDER = "snapshots"
LEDGER_FOLDER = "refused"
RUN_FOLDER = "runs"
"""What jobs say of themselves, a folder each; no reader of samples looks there."""
PROBE_FOLDER = "probes"
"""The true sizes and lengths of clips, where they are kept in the cache."""

LATENT_STREAM = "latent"
TEXT_STREAM = "text.t5"
TEXT_PREFIX = "text."
"""A stream whose name begins so holds one array a caption; any other stream holds one array a sample."""

Container = Literal["tar", "zarr"]
_SUFFIXES: dict[Container, str] = {"tar": ".tar", "zarr": ".zarr.zip"}

_STREAM_NAME = re.compile(r"text\.[a-z0-9][a-z0-9_-]{0,30}")
_TAR_BLOCK = 512
_TAR_RECORD = 10_240


def check_text_stream(name: str) -> None:
    """Raises :class:`InputError` unless ``name`` may name a stream of texts, e.g. ``text.t5``."""
    if not _STREAM_NAME.fullmatch(name):
        raise InputError(
            f"stream {name!r}: expected text.NAME, up to 31 lower-case letters, digits, - and _, e.g. text.t5"
        )


def is_text(stream: str) -> bool:
    """Returns whether a stream holds one array a caption, not one a sample."""
    return stream.startswith(TEXT_PREFIX)


def null_caption_file(stream: str) -> str:
    """Returns where the embedding of the empty caption is stored."""
    return f"{NULL_FOLDER}/{stream}.safetensors"


def shard_object(folder: str, shard_id: str, sha256: str, container: Container) -> str:
    """Returns a shard's path below the cache's root: its identity, then a hash of its bytes.

    Args:
        folder: The samples' bucket, or the stream's name where a shard holds texts alone.
        shard_id: See ``shared.cache.identity.shard_id``.
        sha256: Of the shard's bytes.
        container: Tar or Zarr.
    """
    return f"{SHARD_FOLDER}/{folder}/{shard_id}-{sha256[:16]}{_SUFFIXES[container]}"


def container_of(shard: str) -> Container:
    """Returns the container of a shard by its name."""
    for container, suffix in _SUFFIXES.items():
        if shard.endswith(suffix):
            return container
    raise InputError(f"shard {shard!r}: expected a name that ends in {' or '.join(_SUFFIXES.values())}")


def sample_json(about: Mapping[str, Any], streams: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Returns the JSON beside a sample: what a reader without the index needs to decode its payloads.

    Args:
        about: ``source``, ``num_frames``, ``height``, ``width``, ``fps``, and ``manifest`` with the manifest's other
            columns; of a text that stands alone, nothing.
        streams: For each stream, :func:`latent_json` or :func:`text_json`.
    """
    value = {**about, **streams}
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def latent_json(codec: str, shape: Sequence[int]) -> dict[str, Any]:
    """Returns what decodes a latent, for :func:`sample_json`. ``shape`` is (C, T, H, W), or (2C, T, H, W)."""
    return {"codec": codec, "shape": list(shape)}


def text_json(
    codec: str, channels: int, captions: Sequence[str], num_tokens: Sequence[int], num_bytes: Sequence[int]
) -> dict[str, Any]:
    """Returns what decodes a sample's texts, for :func:`sample_json`; the lists have one entry a caption."""
    return {
        "codec": codec,
        "channels": channels,
        "captions": list(captions),
        "num_tokens": list(num_tokens),
        "bytes": list(num_bytes),
    }


def tar_member_bytes(payload_bytes: int) -> int:
    """Returns what one member takes in a tar: its header and its payload in whole blocks."""
    return _TAR_BLOCK + -(-payload_bytes // _TAR_BLOCK) * _TAR_BLOCK


def tar_bytes(total_member_bytes: int) -> int:
    """Returns the size of a tar whose members take ``total_member_bytes``: two zero blocks, then whole records."""
    return -(-(total_member_bytes + 2 * _TAR_BLOCK) // _TAR_RECORD) * _TAR_RECORD
