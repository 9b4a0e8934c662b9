"""Probing and decoding as the workers do it: a clip's facts or frames, or the row of the ledger that says why not.

Free of torch, so that a decoding worker starts in a moment.
"""

from pathlib import Path

import numpy as np

from preprocess.plan import SampleTask
from shared.cache.ledger import Refusal
from shared.media.probe import Probe, probe
from shared.media.video import MediaError, decode_window
from shared.spec import Bucket

_PASSING_REASONS = frozenset({"missing", "not_readable", "decoder_lost", "no_caption_left"})
"""What may be another on the next run: such a row names no sample, so that the sample is tried again."""


def probe_clip(source: str, path: Path) -> Probe | Refusal:
    """Returns the facts of a clip, or why there are none."""
    try:
        return probe(path)
    except MediaError as error:
        return Refusal(source=source, reason=error.reason, detail=error.detail)


def decode_sample(sample: SampleTask, bucket: Bucket) -> np.ndarray | Refusal:
    """Returns the frames (T, height, width, 3) uint8 of a sample, or why there are none."""
    try:
        return decode_window(sample.path, sample.window, bucket)
    except MediaError as error:
        return refuse(sample, bucket, error.reason, error.detail)


def refuse(sample: SampleTask, bucket: Bucket, reason: str, detail: str) -> Refusal:
    """Returns the ledger's row for a sample that was planned and cannot be encoded."""
    return Refusal(
        source=sample.source,
        source_version=sample.source_version,
        bucket=str(bucket),
        sample=None if reason in _PASSING_REASONS else sample.sample,
        reason=reason,
        detail=detail,
    )
