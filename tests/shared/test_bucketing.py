"""Which buckets a clip fills."""

from fractions import Fraction

import pytest

from shared.bucketing import buckets_of, shortfall
from shared.media.probe import Probe
from shared.spec import Bucket

SQUARE, WIDE, LONG = Bucket(16, 64, 64), Bucket(16, 72, 128), Bucket(32, 64, 64)


def clip(num_frames: int, height: int, width: int) -> Probe:
    """Returns the facts of a clip."""
    return Probe(version="1-a", num_frames=num_frames, height=height, width=width, fps=Fraction(24))


def test_the_nearest_aspect_ratio_comes_before_the_most_pixels() -> None:
    buckets = [SQUARE, WIDE, LONG]
    assert buckets_of(clip(64, 360, 640), buckets, per_clip="best", frame_interval=1) == [WIDE]
    assert buckets_of(clip(64, 400, 400), buckets, per_clip="best", frame_interval=1) == [LONG]
    assert buckets_of(clip(20, 400, 400), buckets, per_clip="best", frame_interval=1) == [SQUARE]
    assert buckets_of(clip(64, 360, 640), buckets, per_clip="all", frame_interval=1) == buckets


@pytest.mark.parametrize(
    ("facts", "interval", "reason"),
    [(clip(15, 64, 64), 1, "too_short"), (clip(30, 64, 64), 2, "too_short"), (clip(16, 64, 63), 1, "too_small")],
)
def test_a_clip_that_fills_no_bucket_has_a_reason(facts: Probe, interval: int, reason: str) -> None:
    found = shortfall(facts, SQUARE, interval)
    assert found is not None
    assert found[0] == reason
    assert buckets_of(facts, [SQUARE], per_clip="best", frame_interval=interval) == []


def test_a_clip_that_just_fills_a_bucket_has_none() -> None:
    assert shortfall(clip(31, 64, 64), SQUARE, 2) is None
