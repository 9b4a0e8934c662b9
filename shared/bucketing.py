"""Which buckets clips fill. Pure; used by the planner, over columns of many clips, and by the estimator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from shared.media.probe import Probe
from shared.spec import Bucket
from shared.windows import Integers, Sampling
from shared.wording import counted

PerClip = Literal["best", "all"]

_DISTANCE_STEPS = 1e6
"""Aspect ratios whose logarithms differ by less than one such step are equally near."""
_FAR = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFacts:
    """What decides which buckets clips (N,) fill."""

    num_frames: npt.NDArray[np.integer]
    height: npt.NDArray[np.integer]
    width: npt.NDArray[np.integer]
    duration: npt.NDArray[np.float64]
    """In seconds."""
    is_image: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, facts: Probe) -> "ClipFacts":
        """Returns the facts of one clip."""
        return cls(
            num_frames=np.array([facts.num_frames]),
            height=np.array([facts.height]),
            width=np.array([facts.width]),
            duration=np.array([facts.duration]),
            is_image=np.array([facts.is_image]),
        )

    def num_places(self, sampling: Sampling) -> Integers:
        """Returns how many places (N,) the clips offer, see ``shared.windows``."""
        return sampling.num_places(self.num_frames, self.duration, self.is_image)


def fill(
    facts: ClipFacts, buckets: Sequence[Bucket], *, per_clip: PerClip, sampling: Sampling
) -> tuple[Integers, Integers]:
    """Returns which clips go into which buckets: pairs (F,) of a clip's number and a bucket's, by bucket, then clip.

    A clip fills a bucket if it has the frames and, as shown, at least its height and width; an image fills buckets of
    one frame alone. The best bucket is that of the nearest aspect ratio, then of the most pixels over all frames.

    Args:
        facts: Of the clips.
        buckets: In their order.
        per_clip: Into the best bucket that a clip fills, or into all.
        sampling: How frames are taken.
    """
    num_places = facts.num_places(sampling)

    def fills(bucket: Bucket) -> npt.NDArray[np.bool_]:
        found = num_places >= sampling.span(bucket.num_frames)
        found &= facts.height >= bucket.height
        found &= facts.width >= bucket.width
        if bucket.num_frames > 1:
            found &= ~facts.is_image
        return found

    if per_clip == "all":
        found = [np.flatnonzero(fills(bucket)) for bucket in buckets]
        return np.concatenate(found), np.repeat(np.arange(len(buckets)), [len(clips) for clips in found])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(facts.width / facts.height)
    best = np.full(len(ratio), -1, np.int16)
    nearest = np.full(len(ratio), _FAR, np.int64)
    order = sorted(range(len(buckets)), key=lambda number: -_pixels(buckets[number]))
    for number in order:  # the most pixels first, so that of equally near ones the first stays
        bucket = buckets[number]
        steps = np.nan_to_num(np.abs(ratio - np.log(bucket.width / bucket.height)) * _DISTANCE_STEPS, posinf=1e15)
        distance = np.rint(steps).astype(np.int64)
        is_better = fills(bucket)
        is_better &= distance < nearest
        np.copyto(best, number, where=is_better)
        np.copyto(nearest, distance, where=is_better)
    clips = np.argsort(best, kind="stable")
    clips = clips[np.searchsorted(best[clips], 0) :]
    return clips, best[clips].astype(np.int64)


def buckets_of(
    facts: Probe, buckets: Sequence[Bucket], *, per_clip: PerClip, frame_interval: int, fps: float | None = None
) -> list[Bucket]:
    """Returns the buckets into which one clip goes: none, the best that it fills, or all that it fills."""
    sampling = Sampling(frame_interval=frame_interval, fps=fps)
    _, numbers = fill(ClipFacts.of(facts), buckets, per_clip=per_clip, sampling=sampling)
    return [buckets[number] for number in numbers]


def shortfall(
    *, num_places: int, height: int, width: int, is_image: bool, buckets: Sequence[Bucket], sampling: Sampling
) -> tuple[Bucket, str, str]:
    """Returns, for a clip that fills none of the buckets, the smallest one, and why it does not fill that: reason and
    detail.

    Args:
        num_places: That the clip offers.
        height: In pixels, as shown.
        width: Likewise.
        is_image: Whether it is an image.
        buckets: At least one.
        sampling: How frames are taken.
    """
    smallest = min([b for b in buckets if b.num_frames == 1 or not is_image] or buckets, key=_pixels)
    needed = sampling.span(smallest.num_frames)
    if is_image and smallest.num_frames > 1:
        return smallest, "too_short", f"an image: bucket {smallest} takes {smallest.num_frames} frames"
    if num_places < needed:
        rate = "" if sampling.fps is None else f" at {sampling.fps:g} a second"
        return smallest, "too_short", f"{counted(num_places, 'frame')}{rate}: bucket {smallest} takes {needed}"
    return smallest, "too_small", f"{width}x{height} pixels: bucket {smallest} takes {smallest.width}x{smallest.height}"


def _pixels(bucket: Bucket) -> int:
    return bucket.num_frames * bucket.height * bucket.width
