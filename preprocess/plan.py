"""What is to be encoded: probed clips, minus what is committed, in shards of one bucket each. Pure."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from shared.bucketing import buckets_of, shortfall
from shared.cache.dataset import CommittedSample
from shared.cache.identity import latent_id, shard_id
from shared.cache.ledger import Refusal
from shared.media.manifest import Clip, Value
from shared.media.probe import Probe
from shared.media.video import Window, centre_window
from shared.shard_size import MAX_SHARD_BYTES
from shared.spec import Bucket

Item = TypeVar("Item")


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
    sample_bytes: Callable[[Bucket, int], int],
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
        sample_bytes: Of a sample in a bucket with so many captions, before entropy coding; a shard has 1 GB at most.
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
        filled = buckets_of(facts, buckets, per_clip=buckets_per_clip, frame_interval=frame_interval)
        if not filled:
            refusals.append(_refusal(clip, facts, buckets, frame_interval))
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
            samples = groups[bucket, generation]
            sizes = [sample_bytes(bucket, len(sample.captions)) for sample in samples]
            for chunk in chunks(samples, sizes, shard_samples(bucket)):
                identity = shard_id((s.sample for s in chunk), streams=streams, generation=generation)
                tasks.append(ShardTask(shard_id=identity, bucket=bucket, samples=tuple(chunk), generation=generation))
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


def chunks(items: Sequence[Item], sizes: Sequence[int], most: int) -> Iterator[Sequence[Item]]:
    """Yields the items of each shard: at most so many, and at most 1 GB if more than one.

    Args:
        items: In their order.
        sizes: Bytes of each.
        most: Items a shard.
    """
    start, total = 0, 0
    for number, size in enumerate(sizes):
        if number > start and (number - start == most or total + size > MAX_SHARD_BYTES):
            yield items[start:number]
            start, total = number, 0
        total += size
    if items:
        yield items[start:]


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


def _refusal(clip: Clip, facts: Probe, buckets: Sequence[Bucket], frame_interval: int) -> Refusal:
    smallest = min(buckets, key=lambda bucket: bucket.num_frames * bucket.height * bucket.width)
    lacking = shortfall(facts, smallest, frame_interval)
    assert lacking is not None
    reason, detail = lacking
    return Refusal(source=clip.source, source_version=facts.version, bucket=str(smallest), reason=reason, detail=detail)
