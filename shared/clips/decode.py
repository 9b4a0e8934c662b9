"""Decoding as the workers do it: a clip's frames, or why there are none.

Free of torch, so that a decoding worker starts in a moment. FFmpeg runs in these workers only: what crashes or hangs
it ends one of their processes, and never an encoder.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from shared.cache.ledger import Refusal
from shared.clips.plan import SampleTask
from shared.media.refusal import MediaError
from shared.media.video import Device, decode_window
from shared.redaction import without_credentials
from shared.spec import Bucket

OUTDATED = "probe_outdated"
"""The reason of a clip that has not the frames which its probe promised: it is probed and planned anew."""
MENDABLE = frozenset({"missing", "not_readable", "no_caption_left"})
"""Refusals that the user can mend without changing the clip: such a row names no sample, so that it is tried again."""

Decoder = Literal["cpu", "nvdec", "auto"]
"""What decodes the video of a job; auto is both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Postponed:
    """A sample that could not be had now, and may be had later: it stays pending and enters no ledger."""

    sample: str
    source: str
    reason: str
    detail: str


Frames = np.ndarray | Refusal | Postponed
"""(T, height, width, 3) uint8, or why there are none."""


def decode_sample(sample: SampleTask, bucket: Bucket, *, device: Device = "cpu") -> Frames:
    """Returns the frames of a sample."""
    try:
        return decode_window(
            sample.media,
            sample.time_range,
            sample.window,
            bucket,
            device=device,
            version=sample.source_version,
        )
    except MediaError as error:
        if error.transient or error.reason == OUTDATED:
            return postpone(sample, error.reason, error.detail)
        return refuse(sample, bucket, error.reason, error.detail)


def refuse(sample: SampleTask, bucket: Bucket, reason: str, detail: str) -> Refusal:
    """Returns the ledger's row for a sample that was planned and cannot be encoded."""
    return Refusal(
        source=sample.source,
        source_version=sample.source_version,
        bucket=str(bucket),
        sample=None if reason in MENDABLE else sample.sample,
        reason=reason,
        detail=without_credentials(detail),
    )


def postpone(sample: SampleTask, reason: str, detail: str) -> Postponed:
    """Returns what is said of a sample that is to be tried again."""
    return Postponed(sample=sample.sample, source=sample.source, reason=reason, detail=detail)
