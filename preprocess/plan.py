"""What is to be encoded: probed clips, minus what is committed, in shards of one bucket each. Pure."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.cache.dataset import CommittedSample
from shared.cache.identity import latent_id, shard_id
from shared.cache.ledger import Refusal
from shared.media.manifest import Clip, Value
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
    columns: Mapping[str, Value] = field(default_factory=dict)
    """What else the manifest says of the clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """Samples of one bucket that go into one shard, in this order."""

    shard_id: str
    bucket: Bucket
    samples: tuple[SampleTask, ...]
    generation: int = 0
    """0, or one more than that at which these samples were removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The work, and what needs none."""

    tasks: tuple[ShardTask, ...]
    refusals: tuple[Refusal, ...]
    """Clips that fill no bucket."""
    committed: tuple[tuple[str, Clip], ...]
    """Samples that are in the cache already, with what the manifest says of them now."""
    num_refused_before: int
    """Samples that an earlier run put into the ledger."""
    stale: tuple[str, ...]
    """Samples of clips that changed, or that the manifest names no more."""

    @property
    def num_samples(self) -> int:
        """Samples to encode."""
        return sum(len(task.samples) for task in self.tasks)


def make_plan(
    clips: Sequence[tuple[Clip, Probe]],
    *,
    sources: Collection[str],
    buckets: Sequence[Bucket],
    buckets_per_clip: Literal["best", "all"],
    frame_interval: int,
    shard_samples: Callable[[Bucket], int],
    streams: Collection[str],
    committed: Mapping[str, CommittedSample],
    removed: Mapping[str, int],
    refused: Collection[str],
) -> Plan:
    """Returns the shards to encode.

    Args:
        clips: In the manifest's order, which is the order of samples in shards.
        sources: Of all rows of the manifest, those of clips that cannot be probed too.
        buckets: Sizes asked for.
        buckets_per_clip: Into the best bucket that a clip fills, or into all.
        frame_interval: Source frames from one taken frame to the next.
        shard_samples: Samples a shard of a bucket, at most.
        streams: What the shards will hold.
        committed: The samples that are in the cache, by their identities.
        removed: Of samples that were removed once, the generation of their latest removal.
        refused: Identities of samples that are in its ledger.
    """
    groups: dict[tuple[Bucket, int], list[SampleTask]] = defaultdict(list)
    refusals: list[Refusal] = []
    found: list[tuple[str, Clip]] = []
    num_refused_before = 0
    for clip, facts in clips:
        filled = [bucket for bucket in buckets if _shortfall(facts, bucket, frame_interval) is None]
        if not filled:
            refusals.append(_refusal(clip, facts, buckets, frame_interval))
        if buckets_per_clip == "best":
            filled = [min(filled, key=lambda bucket: _preference(facts, bucket))] if filled else []
        for bucket in filled:
            task = _sample_task(clip, facts, bucket, frame_interval)
            if task.sample in committed:
                found.append((task.sample, clip))
            elif task.sample in refused:
                num_refused_before += 1
            else:
                groups[bucket, removed.get(task.sample, -1) + 1].append(task)
    tasks = []
    for bucket in buckets:
        for generation in sorted(g for b, g in groups if b == bucket):
            samples, size = groups[bucket, generation], shard_samples(bucket)
            for start in range(0, len(samples), size):
                chunk = tuple(samples[start : start + size])
                identity = shard_id((s.sample for s in chunk), streams=streams, generation=generation)
                tasks.append(ShardTask(shard_id=identity, bucket=bucket, samples=chunk, generation=generation))
    versions = {clip.source: facts.version for clip, facts in clips}
    return Plan(
        tasks=tuple(tasks),
        refusals=tuple(refusals),
        committed=tuple(found),
        num_refused_before=num_refused_before,
        stale=tuple(
            sample
            for sample, known in committed.items()
            if known.source not in sources or versions.get(known.source, known.source_version) != known.source_version
        ),
    )


def samples_a_shard(*, sample_bytes: int, sample_pixels: int) -> int:
    """Returns how many samples go into a shard unless the user says otherwise.

    A shard is what a killed worker loses, and one file: as many samples as take 256 MB before entropy coding, or one
    minute of an H200 with the Stable Diffusion VAE (181 frames of 512x512 a second), but at most 512.
    """
    return max(1, min(512, 256_000_000 // sample_bytes, int(60 * 181 * 512 * 512 / sample_pixels)))


def most_samples_a_shard(*, sample_bytes: int, sample_pixels: int) -> int:
    """Returns how many samples a shard may have: 1 GB, or three minutes of the same GPU."""
    return max(1, min(1_000_000_000 // sample_bytes, int(180 * 181 * 512 * 512 / sample_pixels)))


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
        columns=clip.columns,
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
