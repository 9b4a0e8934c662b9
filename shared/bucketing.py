"""Which buckets a clip fills. Pure; used by the planner and by the estimator."""

import math
from collections.abc import Sequence
from typing import Literal

from shared.media.probe import Probe
from shared.media.video import span
from shared.spec import Bucket


def shortfall(facts: Probe, bucket: Bucket, frame_interval: int) -> tuple[str, str] | None:
    """Returns why a clip does not fill a bucket (reason and detail), or None if it does."""
    needed = span(bucket.num_frames, frame_interval)
    if facts.num_frames < needed:
        return "too_short", f"{facts.num_frames} frames: bucket {bucket} takes {needed}"
    if facts.height < bucket.height or facts.width < bucket.width:
        return "too_small", f"{facts.width}x{facts.height} pixels: bucket {bucket} takes {bucket.width}x{bucket.height}"
    return None


def buckets_of(
    facts: Probe, buckets: Sequence[Bucket], *, per_clip: Literal["best", "all"], frame_interval: int
) -> list[Bucket]:
    """Returns the buckets into which a clip goes: none, the best that it fills, or all that it fills."""
    filled = [bucket for bucket in buckets if shortfall(facts, bucket, frame_interval) is None]
    if per_clip == "best" and filled:
        return [min(filled, key=lambda bucket: _preference(facts, bucket))]
    return filled


def _preference(facts: Probe, bucket: Bucket) -> tuple[float, int]:
    """Sorts the best bucket first: the nearest aspect ratio, then the most pixels over all frames."""
    distance = abs(math.log((bucket.width / bucket.height) / (facts.width / facts.height)))
    return round(distance, 6), -bucket.num_frames * bucket.height * bucket.width
