"""Which buckets a clip fills."""

import math
from fractions import Fraction

import numpy as np
import pytest

from shared.bucket_presets import PUBLISHED, parse_buckets
from shared.bucketing import ClipFacts, PerClip, buckets_of, fill, shortfall
from shared.errors import InputError
from shared.media.probe import Probe
from shared.spec import Bucket, VaeGeometry, latent_shape
from shared.windows import Sampling

SQUARE, WIDE, LONG, STILL = Bucket(16, 64, 64), Bucket(16, 72, 128), Bucket(32, 64, 64), Bucket(1, 64, 64)


def clip(num_frames: int, height: int, width: int, *, is_image: bool = False) -> Probe:
    """Returns the facts of a clip."""
    return Probe(
        version="1-a",
        num_frames=num_frames,
        height=height,
        width=width,
        fps=Fraction(24),
        duration=num_frames / 24,
        rotation=0,
        is_image=is_image,
        codec="h264",
    )


def why(facts: Probe, buckets: list[Bucket], sampling: Sampling) -> tuple[Bucket, str, str]:
    """Returns why a clip fills none of the buckets."""
    places = int(ClipFacts.of(facts).num_places(sampling)[0])
    return shortfall(
        num_places=places,
        height=facts.height,
        width=facts.width,
        is_image=facts.is_image,
        buckets=buckets,
        sampling=sampling,
    )


def test_the_nearest_aspect_ratio_comes_before_the_most_pixels() -> None:
    buckets = [SQUARE, WIDE, LONG]
    assert buckets_of(clip(64, 360, 640), buckets, per_clip="best", frame_interval=1) == [WIDE]
    assert buckets_of(clip(64, 400, 400), buckets, per_clip="best", frame_interval=1) == [LONG]
    assert buckets_of(clip(20, 400, 400), buckets, per_clip="best", frame_interval=1) == [SQUARE]
    assert buckets_of(clip(64, 360, 640), buckets, per_clip="all", frame_interval=1) == buckets


@pytest.mark.parametrize("per_clip", ["best", "all"])
def test_many_clips_at_once_go_where_each_goes_alone(per_clip: PerClip) -> None:
    random = np.random.default_rng(0)
    buckets = [*parse_buckets(["16x144p", "8x240p", "1x256"]), SQUARE, LONG]
    clips = [
        clip(int(frames), int(height), int(width), is_image=bool(frames == 1))
        for frames, height, width in zip(
            random.integers(1, 40, 300), random.integers(40, 700, 300), random.integers(40, 700, 300), strict=True
        )
    ]
    facts = ClipFacts(
        num_frames=np.array([facts.num_frames for facts in clips]),
        height=np.array([facts.height for facts in clips]),
        width=np.array([facts.width for facts in clips]),
        duration=np.array([facts.duration for facts in clips]),
        is_image=np.array([facts.is_image for facts in clips]),
    )
    rows, numbers = fill(facts, buckets, per_clip=per_clip, sampling=Sampling())
    together: dict[int, list[Bucket]] = {}
    for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
        together.setdefault(row, []).append(buckets[number])
    for row, one in enumerate(clips):
        assert together.get(row, []) == as_defined(one, buckets, per_clip), one
    assert (np.diff(numbers) >= 0).all()


def as_defined(facts: Probe, buckets: list[Bucket], per_clip: PerClip) -> list[Bucket]:
    """Returns the buckets of one clip, in plain words."""
    filled = [
        bucket
        for bucket in buckets
        if bucket.num_frames <= facts.num_frames
        and bucket.height <= facts.height
        and bucket.width <= facts.width
        and (bucket.num_frames == 1 or not facts.is_image)
    ]
    if per_clip == "all" or not filled:
        return filled

    def preference(bucket: Bucket) -> tuple[float, int]:
        distance = abs(math.log(bucket.width / bucket.height) - math.log(facts.width / facts.height))
        return round(distance, 6), -bucket.num_frames * bucket.height * bucket.width

    return [min(filled, key=preference)]


@pytest.mark.parametrize(
    ("facts", "interval", "reason"),
    [(clip(15, 64, 64), 1, "too_short"), (clip(30, 64, 64), 2, "too_short"), (clip(16, 64, 63), 1, "too_small")],
)
def test_a_clip_that_fills_no_bucket_has_a_reason(facts: Probe, interval: int, reason: str) -> None:
    bucket, found, _ = why(facts, [LONG, SQUARE], Sampling(frame_interval=interval))
    assert (bucket, found) == (SQUARE, reason)
    assert buckets_of(facts, [SQUARE], per_clip="best", frame_interval=interval) == []


def test_a_clip_that_just_fills_a_bucket_goes_there() -> None:
    assert buckets_of(clip(31, 64, 64), [SQUARE], per_clip="best", frame_interval=2) == [SQUARE]


def test_images_fill_buckets_of_one_frame_alone_and_clips_fill_those_too() -> None:
    image = clip(1, 100, 100, is_image=True)
    assert buckets_of(image, [SQUARE, STILL], per_clip="all", frame_interval=1) == [STILL]
    assert buckets_of(clip(16, 100, 100), [SQUARE, STILL], per_clip="all", frame_interval=1) == [SQUARE, STILL]
    assert buckets_of(image, [SQUARE], per_clip="all", frame_interval=1, fps=8.0) == []
    assert why(image, [SQUARE], Sampling()) == (SQUARE, "too_short", "an image: bucket 16x64x64 takes 16 frames")
    assert why(clip(1, 32, 32, is_image=True), [SQUARE, STILL], Sampling())[:2] == (STILL, "too_small")


def test_by_time_a_clip_fills_what_its_duration_allows() -> None:
    two_seconds = clip(48, 64, 64)
    assert buckets_of(two_seconds, [SQUARE], per_clip="best", frame_interval=1, fps=8.0) == [SQUARE]
    assert buckets_of(two_seconds, [SQUARE], per_clip="best", frame_interval=1, fps=7.4) == []
    found = why(two_seconds, [SQUARE], Sampling(fps=7.0))
    assert found == (SQUARE, "too_short", "14 frames at 7 a second: bucket 16x64x64 takes 16")


def test_a_preset_is_a_table_of_sizes_that_common_autoencoders_take() -> None:
    assert parse_buckets(["16x720p", "16x64x64"])[-1] == SQUARE
    assert Bucket(16, 720, 1280) in parse_buckets(["16x720p"])
    assert Bucket(1, 512, 512) in parse_buckets(["1x512"])
    assert len(parse_buckets(["1x512"])) == len(PUBLISHED["512"]) == 40
    assert parse_buckets(["16x240p"]) != parse_buckets(["16x240p-v1.0"])
    for name, sizes in PUBLISHED.items():
        buckets = parse_buckets([f"17x{name}"])
        assert len(buckets) >= len(sizes) - 3
        for bucket in buckets:
            latent_shape(bucket, VaeGeometry(latent_channels=4, spatial_stride=16, temporal_stride=4))
        for height, width in sizes:
            assert Bucket(17, height // 16 * 16, width // 16 * 16) in buckets


def test_tables_keep_to_their_pixels_and_go_from_wide_to_high() -> None:
    for name, sizes in PUBLISHED.items():
        pixels = [height * width for height, width in sizes]
        assert max(pixels) < 1.2 * min(pixels), name
        ratios = [height / width for height, width in sizes]
        assert ratios == sorted(ratios), name


def test_a_preset_that_there_is_not_is_refused_by_the_names_that_there_are() -> None:
    with pytest.raises(InputError, match="no table '999p': expected one of 144p, 240p"):
        parse_buckets(["16x999p"])
    with pytest.raises(InputError, match="expected FRAMESxHEIGHTxWIDTH"):
        parse_buckets(["wide"])
