"""What makes two samples the same: the hashes by which samples, texts and shards are named."""

import hashlib
import json
from collections.abc import Iterable

from shared.spec import Bucket


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def latent_id(*, source: str, source_version: str, bucket: Bucket, frame_interval: int) -> str:
    """Returns the identity (32 hex digits) of a latent: of all that decides which pixels are encoded.

    Args:
        source: The clip's path as the manifest gives it, so that a moved data set keeps its identities.
        source_version: Changes when the file does; see ``shared.media.probe.file_version``.
        bucket: The size that the clip is brought to.
        frame_interval: Source frames from one taken frame to the next.
    """
    return _digest(["latent", 1, source, source_version, str(bucket), frame_interval])


def text_id(cleaned_caption: str) -> str:
    """Returns the identity (32 hex digits) of a text: its caption after cleaning."""
    return _digest(["text", 1, cleaned_caption])


def shard_id(members: Iterable[str], *, streams: Iterable[str], generation: int = 0) -> str:
    """Returns the identity (32 hex digits) of a shard that is planned to hold these members, in this order.

    Args:
        members: The identities of samples, or of texts; for new texts of samples, both.
        streams: What of them the shard holds.
        generation: 0 for what is encoded first; encoded again after a removal or a change, one more each time.
    """
    return _digest(["shard", 2, sorted(streams), generation, *members])


def ledger_id(rows: list[dict]) -> str:
    """Returns the identity (32 hex digits) of rows of the ledger: of their content."""
    return _digest(["ledger", 1, rows])
