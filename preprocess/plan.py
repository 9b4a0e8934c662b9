"""What is to be encoded: probed clips, minus what is committed, in shards of one bucket each. Pure."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.cache.identity import latent_id, shard_id
from shared.cache.ledger import Refusal
from shared.media.manifest import Clip
from shared.media.probe import Probe
from shared.media.video import Window, centre_window, span
from shared.spec import Bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTask:
    """One clip to be encoded in one bucket."""

    sample: str
    """Its identity."""
    source: str
    source_version: str
    path: Path
    captions: tuple[str, ...]
    window: Window
    fps: float
    """Frames a second of the frames that are taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """Samples of one bucket that go into one shard, in this order."""

    shard_id: str
    bucket: Bucket
    samples: tuple[SampleTask, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The work, and what needs none."""

    tasks: tuple[ShardTask, ...]
    refusals: tuple[Refusal, ...]
    """Clips that fill no bucket."""
    num_committed: int
    """Samples that are in the cache already."""
    num_other_captions: int
    """Of these, those whose captions in the manifest are others than in the cache, which keeps its own."""
    num_refused_before: int
    """Samples that an earlier run put into the ledger."""

    @property
    def num_samples(self) -> int:
        """Samples to encode."""
        return sum(len(task.samples) for task in self.tasks)


def make_plan(
    clips: Sequence[tuple[Clip, Probe]],
    *,
    buckets: Sequence[Bucket],
    buckets_per_clip: Literal["best", "all"],
    frame_interval: int,
    shard_samples: int,
    committed: Mapping[str, tuple[str, ...]],
    refused: Collection[str],
) -> Plan:
    """Returns the shards to encode.

    Args:
        clips: In the manifest's order, which is the order of samples in shards.
        buckets: Sizes asked for.
        buckets_per_clip: Into the best bucket that a clip fills, or into all.
        frame_interval: Source frames from one taken frame to the next.
        shard_samples: Samples a shard, at most.
        committed: Captions of the samples that are in the cache, by their identities.
        refused: Identities of samples that are in its ledger.
    """
    by_bucket: dict[Bucket, list[SampleTask]] = {bucket: [] for bucket in buckets}
    refusals: list[Refusal] = []
    num_committed = num_other_captions = num_refused_before = 0
    for clip, facts in clips:
        filled = [bucket for bucket in buckets if _shortfall(facts, bucket, frame_interval) is None]
        if not filled:
            refusals.append(_refusal(clip, facts, buckets, frame_interval))
        if buckets_per_clip == "best":
            filled = [min(filled, key=lambda bucket: _preference(facts, bucket))] if filled else []
        for bucket in filled:
            task = _sample_task(clip, facts, bucket, frame_interval)
            if task.sample in committed:
                num_committed += 1
                num_other_captions += set(committed[task.sample]) != set(clip.captions)
            elif task.sample in refused:
                num_refused_before += 1
            else:
                by_bucket[bucket].append(task)
    tasks = []
    for bucket, samples in by_bucket.items():
        for start in range(0, len(samples), shard_samples):
            chunk = tuple(samples[start : start + shard_samples])
            tasks.append(ShardTask(shard_id=shard_id(s.sample for s in chunk), bucket=bucket, samples=chunk))
    return Plan(
        tasks=tuple(tasks),
        refusals=tuple(refusals),
        num_committed=num_committed,
        num_other_captions=num_other_captions,
        num_refused_before=num_refused_before,
    )


def _sample_task(clip: Clip, facts: Probe, bucket: Bucket, frame_interval: int) -> SampleTask:
    return SampleTask(
        sample=latent_id(
            source=clip.source, source_version=facts.version, bucket=bucket, frame_interval=frame_interval
        ),
        source=clip.source,
        source_version=facts.version,
        path=clip.path,
        captions=clip.captions,
        window=centre_window(facts.num_frames, num_frames=bucket.num_frames, interval=frame_interval),
        fps=float(facts.fps / frame_interval),
    )


def _shortfall(facts: Probe, bucket: Bucket, frame_interval: int) -> tuple[str, str] | None:
    """Returns why a clip does not fill a bucket (reason and detail), or None if it does."""
    needed = span(bucket.num_frames, frame_interval)
    if facts.num_frames < needed:
        return "too_short", f"{facts.num_frames} frames: bucket {bucket} takes {needed}"
    if facts.height < bucket.height or facts.width < bucket.width:
        return "too_small", f"{facts.width}x{facts.height} pixels: bucket {bucket} takes {bucket.width}x{bucket.height}"
    return None


def _preference(facts: Probe, bucket: Bucket) -> tuple[float, int]:
    """Sorts the best bucket first: the nearest aspect ratio, then the most pixels over all frames."""
    distance = abs(math.log((bucket.width / bucket.height) / (facts.width / facts.height)))
    return round(distance, 6), -bucket.num_frames * bucket.height * bucket.width


def _refusal(clip: Clip, facts: Probe, buckets: Sequence[Bucket], frame_interval: int) -> Refusal:
    smallest = min(buckets, key=lambda bucket: bucket.num_frames * bucket.height * bucket.width)
    shortfall = _shortfall(facts, smallest, frame_interval)
    assert shortfall is not None
    reason, detail = shortfall
    return Refusal(source=clip.source, source_version=facts.version, bucket=str(smallest), reason=reason, detail=detail)
