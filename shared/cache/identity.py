"""What makes two samples the same: the hashes by which samples, texts and shards are named."""

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.media.clip import TimeRange
from shared.spec import Bucket

_SPECIAL = r'["\\\x00-\x1f]'
"""What JSON escapes."""


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _digest(value: object) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:32]


def latent_id(
    *,
    source: str,
    source_version: str,
    bucket: Bucket,
    frame_interval: int,
    time_range: TimeRange | None = None,
    fps: float | None = None,
    window: int | None = None,
    flip: bool = False,
) -> str:
    """Returns the identity (32 hex digits) of a latent: of all that decides which pixels are encoded.

    That of the middle of a whole clip, whose frames are taken by number, is of the first four alone.

    Args:
        source: The clip's path as the manifest gives it, so that a moved data set keeps its identities.
        source_version: Changes when the file does; see ``shared.media.probe.file_version``.
        bucket: The size that the clip is brought to.
        frame_interval: Source frames from one taken frame to the next; 1 where they are taken by time.
        time_range: The part of the file that the clip is, if it is not all of it.
        fps: Frames a second, if they are taken by time.
        window: Where the window starts; None only for the middle of a whole clip by number.
        flip: Whether it is mirrored.
    """
    plain = [source, source_version, str(bucket), frame_interval]
    if window is None:
        assert (time_range, fps, flip) == (None, None, False)
        return _digest(["latent", 1, *plain])
    times = None if time_range is None else [time_range.start, time_range.end]
    return _digest(["latent", 1, *plain, times, fps, window, flip])


def latent_numbers(
    *, sources: pa.Array, source_versions: pa.Array, bucket: Bucket, frame_interval: int, more: pa.Array | None = None
) -> npt.NDArray[np.uint64]:
    """Returns what :func:`latent_id` does, of many latents (N,) of a bucket and as numbers (N, 2).

    Args:
        sources: (N,), strings.
        source_versions: Likewise.
        bucket: Of all.
        frame_interval: Likewise.
        more: (N,), the JSON of time range, fps, window and flip, each after a comma, of those latents that are not the
            middle of a whole clip by number, and the empty string of those that are; None if all are.
    """
    parts = [json_strings(sources), pa.scalar(","), json_strings(source_versions)]
    rest = f',"{bucket}",{frame_interval}'
    last = [pa.scalar(f"{rest}]")] if more is None else [pa.scalar(rest), more, pa.scalar("]")]
    texts = pc.binary_join_element_wise(pa.scalar('["latent",1,'), *parts, *last, pa.scalar(""))
    digests = b"".join([hashlib.sha256(text).digest()[:16] for text in texts.cast(pa.binary()).to_pylist()])
    return np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)


def json_strings(column: pa.Array) -> pa.Array:
    """Returns strings (N,) as JSON writes them, without escaping what is not ASCII."""
    quoted = pc.binary_join_element_wise(pa.scalar('"'), column, pa.scalar('"'), pa.scalar(""))
    is_special = pc.match_substring_regex(column, _SPECIAL)
    if not pc.any(is_special).as_py():
        return quoted
    special = [_canonical(text) for text in column.filter(is_special).to_pylist()]
    return pc.replace_with_mask(quoted, is_special, pa.array(special, quoted.type))


def identity_texts(numbers: npt.NDArray[np.uint64]) -> list[str]:
    """Returns identities (N, 2) as they are written: 32 hex digits each."""
    digits = numbers.astype(">u8").tobytes().hex()
    return [digits[start : start + 32] for start in range(0, len(digits), 32)]


def identity_numbers(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Returns identities as numbers (N, 2)."""
    return np.frombuffer(bytes.fromhex("".join(texts)), ">u8").astype(np.uint64).reshape(-1, 2)


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
