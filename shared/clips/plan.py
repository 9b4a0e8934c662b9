"""What is to be encoded: probed clips, minus what is committed, in shards of one bucket each. Pure, and columnar: a
plan of ten million samples is some arrays, of which tasks are made when they are asked for.

All samples of a shard are of the same window and mirrored alike, and the shards of a clip's other windows hold the same
clips in the same order, so that a trainer can choose one variant for a whole run of clips.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.bucketing import PerClip
from shared.cache.committed import Removed
from shared.cache.identity import identity_texts, shard_id
from shared.clips.refusals import Refusals
from shared.clips.samples import BucketSamples, SampleMaker, Variant, find_samples
from shared.fingerprints import Lookup
from shared.media.clip import Media, TimeRange, Value, Window
from shared.media.manifest import Manifest
from shared.shard_size import MAX_SHARD_BYTES
from shared.spec import Bucket
from shared.windows import Integers, Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTask:
    """One window of a clip to be encoded in one bucket."""

    sample: str
    """Its identity."""
    source: str
    source_version: str
    media: Media
    time_range: TimeRange | None
    captions: tuple[str, ...]
    window: Window
    is_centre: bool
    """Whether the window is the one in the middle."""
    fps: float
    """Frames a second of the frames that are taken."""
    columns: Mapping[str, Value] = field(default_factory=dict)
    """What else the manifest says of the clip."""

    @property
    def stored_window(self) -> int | None:
        """Where the window starts; None for the middle of a whole clip by number, see ``latent_id``."""
        is_plain = self.is_centre and self.time_range is None and self.window.fps is None and not self.window.flip
        return None if is_plain else self.window.start


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """Samples of one bucket that go into one shard, in this order."""

    shard_id: str
    bucket: Bucket
    samples: tuple[SampleTask, ...]
    generation: int = 0
    """0, or one more than that at which these samples were removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRows:
    """The samples (n,) of one shard in columns, in its order."""

    shard_id: str
    bucket: Bucket
    variant: Variant
    clips: Integers
    """(n,), rows of the manifest."""
    numbers: npt.NDArray[np.uint64]
    """(n, 2), their identities."""
    starts: npt.NDArray[np.int32]
    """(n,), where their windows start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What decides which samples there are, and how they go into shards."""

    buckets: Sequence[Bucket]
    buckets_per_clip: PerClip
    """Into the best bucket that a clip fills, or into all."""
    sampling: Sampling
    windows_per_clip: int = 1
    """Windows of a clip, at most."""
    flip: bool = False
    """Whether each is encoded a second time, mirrored."""
    shard_samples: Callable[[Bucket], int]
    """Samples a shard of a bucket, at most."""
    sample_bytes: Callable[[Bucket, int], int]
    """Of a sample in a bucket with so many captions, before entropy coding; a shard has 1 GB at most."""
    streams: Collection[str]
    """What the shards will hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketTotals:
    """How much is to be encoded in one bucket."""

    num_clips: int
    num_samples: int
    """More than clips where these have several windows, or are mirrored."""
    num_shards: int
    num_captions: int
    """Of all samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    """Samples of one bucket and variant that go into shards of one generation, in the manifest's order."""

    bucket: Bucket
    variant: Variant
    generation: int
    clips: Integers
    """(S,), rows of the manifest."""
    numbers: npt.NDArray[np.uint64]
    """(S, 2), their identities."""
    starts: npt.NDArray[np.int32]
    """(S,), where their windows start."""


class ShardTasks(Sequence[ShardTask]):
    """Shards, each made when it is asked for. Slices of it are such sequences too.

    Args:
        maker: Makes the samples.
        streams: What the shards hold.
        segments: Samples.
        shards: (N, 3), of each shard its segment and the first and the last but one of its samples in it.
    """

    def __init__(
        self, maker: SampleMaker, streams: Collection[str], segments: Sequence[_Segment], shards: Integers
    ) -> None:
        self._maker, self._streams, self._segments, self._shards = maker, tuple(streams), segments, shards

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, place: int) -> ShardTask: ...
    @overload
    def __getitem__(self, place: slice) -> "ShardTasks": ...
    def __getitem__(self, place: int | slice) -> "ShardTask | ShardTasks":
        if isinstance(place, slice):
            return ShardTasks(self._maker, self._streams, self._segments, self._shards[place])
        number, first, end = self._shards[place].tolist()
        segment = self._segments[number]
        names, rows = identity_texts(segment.numbers[first:end]), segment.clips[first:end]
        parts = (names, self._maker.clips(rows), self._maker.versions(rows), self._maker.rates(rows))
        samples = tuple(
            SampleTask(
                sample=name,
                source=clip.source,
                source_version=version,
                media=clip.media,
                time_range=clip.time_range,
                captions=clip.captions,
                window=self._maker.window(segment.bucket, segment.variant, start),
                is_centre=segment.variant.number == 0,
                fps=rate,
                columns=clip.columns,
            )
            for name, clip, version, rate, start in zip(*parts, segment.starts[first:end].tolist(), strict=True)
        )
        return ShardTask(
            shard_id=self._shard_id(segment, names),
            bucket=segment.bucket,
            samples=samples,
            generation=segment.generation,
        )

    def rows(self, place: int) -> ShardRows:
        """Returns the samples of one shard in columns, without making them."""
        number, first, end = self._shards[place].tolist()
        segment = self._segments[number]
        numbers = segment.numbers[first:end]
        return ShardRows(
            shard_id=self._shard_id(segment, identity_texts(numbers)),
            bucket=segment.bucket,
            variant=segment.variant,
            clips=segment.clips[first:end],
            numbers=numbers,
            starts=segment.starts[first:end],
        )

    def _shard_id(self, segment: _Segment, names: Sequence[str]) -> str:
        return shard_id(names, streams=self._streams, generation=segment.generation)

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int((self._shards[:, 2] - self._shards[:, 1]).sum())

    def per_bucket(self) -> dict[Bucket, BucketTotals]:
        """Returns how much there is of each bucket."""
        rows: dict[Bucket, list[Integers]] = {}
        for number, first, end in self._shards.tolist():
            segment = self._segments[number]
            rows.setdefault(segment.bucket, []).append(segment.clips[first:end])
        totals = {}
        for bucket, parts in rows.items():
            clips = np.concatenate(parts)
            totals[bucket] = BucketTotals(
                num_clips=len(np.unique(clips)),
                num_samples=len(clips),
                num_shards=len(parts),
                num_captions=int(self._maker.num_captions(clips).sum()),
            )
        return totals

    def clip_rows(self) -> Integers:
        """Returns the rows of the manifest whose clips the shards hold, each once."""
        parts = [self._segments[number].clips[first:end] for number, first, end in self._shards.tolist()]
        return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The work, and what needs none."""

    tasks: ShardTasks
    refusals: Refusals
    """Clips that fill no bucket, or of which probing says that they cannot be used."""
    committed: tuple[Integers, Integers]
    """Samples that are in the cache already: their rows among the committed ones (M,), and those of their clips in the
    manifest (M,)."""
    num_refused_before: int
    """Samples that an earlier run put into the ledger."""

    @classmethod
    def empty(cls, manifest: Manifest) -> "Plan":
        """Returns the plan of a job that encodes no clips."""
        unknown = pa.nulls(manifest.table.num_rows)
        maker = SampleMaker(manifest, pa.table({"version": unknown, "reason": unknown}), Sampling())
        none = np.empty(0, np.int64)
        return cls(
            tasks=ShardTasks(maker, (), (), np.empty((0, 3), np.int64)),
            refusals=Refusals(maker, (), none, none),
            committed=(none, none),
            num_refused_before=0,
        )

    @property
    def num_samples(self) -> int:
        """Samples to encode."""
        return self.tasks.num_samples


def make_plan(
    manifest: Manifest,
    probes: pa.Table,
    options: PlanOptions,
    *,
    committed: Lookup,
    removed: Removed,
    refused: Lookup,
    rows: Integers | None = None,
) -> Plan:
    """Returns the shards to encode.

    Args:
        manifest: Whose order is that of samples in shards.
        probes: Of its rows, see ``shared.clips.probes.Probes.table_for``; those that are not probed wait.
        options: What is wanted.
        committed: Identities of the samples that are in the cache.
        removed: Samples that were removed once.
        refused: Identities of samples that are in its ledger.
        rows: Of the manifest, ascending, if only these are wanted.
    """
    maker = SampleMaker(manifest, probes, options.sampling)
    found = find_samples(
        maker,
        options.buckets,
        per_clip=options.buckets_per_clip,
        windows_per_clip=options.windows_per_clip,
        flip=options.flip,
        rows=rows,
    )
    segments: list[_Segment] = []
    shards: list[Integers] = [np.empty((0, 3), np.int64)]
    known: list[tuple[Integers, Integers]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    num_refused = 0
    for bucket, samples in zip(options.buckets, found.by_bucket, strict=True):
        pending = np.full(samples.exists.shape, -1, np.int32)
        for number in range(len(samples.variants)):
            exists = samples.exists[:, number]
            numbers = samples.numbers[exists, number]
            places = committed.find(numbers)
            is_known = places >= 0
            known.append((places[is_known], samples.clips[exists][is_known]))
            is_refused = ~is_known & (refused.find(numbers) >= 0)
            num_refused += int(is_refused.sum())
            generations = removed.next_generations(numbers)
            generations[is_known | is_refused] = -1
            pending[exists, number] = generations
        most = options.shard_samples(bucket)
        for chosen in _groups(pending):
            generations_of = pending[chosen[0]].tolist()
            sizes = _sizes(maker.num_captions(samples.clips[chosen]), bucket, options.sample_bytes)
            bounds = chunk_bounds(sizes, most)
            parts = []
            for number, generation in enumerate(generations_of):
                if generation < 0:
                    continue
                segment = np.full(len(bounds) - 1, len(segments))
                parts.append(np.stack([segment, bounds[:-1], bounds[1:]], axis=1))
                segments.append(_segment(samples, bucket, number, generation, chosen))
            shards.append(np.stack(parts, axis=1).reshape(-1, 3))
    return Plan(
        tasks=ShardTasks(maker, options.streams, segments, np.concatenate(shards)),
        refusals=Refusals(maker, options.buckets, found.unfilled, found.unusable),
        committed=(np.concatenate([rows for rows, _ in known]), np.concatenate([rows for _, rows in known])),
        num_refused_before=num_refused,
    )


def _segment(samples: BucketSamples, bucket: Bucket, number: int, generation: int, chosen: Integers) -> _Segment:
    everything = len(chosen) == len(samples.clips)
    rows: Integers | slice = slice(None) if everything else chosen
    return _Segment(
        bucket=bucket,
        variant=samples.variants[number],
        generation=generation,
        clips=samples.clips[rows],
        numbers=samples.numbers[rows, number],
        starts=samples.starts[rows, number],
    )


def _groups(pending: npt.NDArray[np.int32]) -> Iterator[Integers]:
    """Yields clips (n,) of which the same variants are to be encoded in the same generations, lowest first.

    Args:
        pending: (F, V), the generation of each variant of each clip, -1 where it is not to be encoded.
    """
    kinds = np.zeros(len(pending), np.int64)
    for column in pending.T:
        if len(column) and (low := column.min()) != (high := column.max()):
            _, kinds = np.unique(kinds * (int(high) - int(low) + 1) + (column - low), return_inverse=True)
        # else all are alike in this variant
    order = np.argsort(kinds, kind="stable") if len(kinds) and kinds.any() else np.arange(len(kinds))
    bounds = np.flatnonzero(np.diff(kinds[order], prepend=-1, append=-1))
    for first, end in pairwise(bounds.tolist()):
        chosen = order[first:end]
        if (pending[chosen[0]] >= 0).any():
            yield chosen


def _sizes(num_captions: Integers, bucket: Bucket, sample_bytes: Callable[[Bucket, int], int]) -> Integers:
    counts, kind_of = np.unique(num_captions, return_inverse=True)
    return np.array([sample_bytes(bucket, int(count)) for count in counts], np.int64)[kind_of]


def chunk_bounds(sizes: Integers | Sequence[int], most: int) -> Integers:
    """Returns where shards begin and end (S + 1,): at most so many items each, and at most 1 GB if more than one.

    Args:
        sizes: (N,), bytes of each item, in their order.
        most: Items a shard.
    """
    ends = np.cumsum(np.asarray(sizes, np.int64))
    if not len(ends) or int(np.max(sizes)) * most <= MAX_SHARD_BYTES:
        return np.append(np.arange(0, len(ends), most), len(ends))
    bounds = [0]
    while (start := bounds[-1]) < len(ends):
        before = int(ends[start - 1]) if start else 0
        end = int(np.searchsorted(ends, before + MAX_SHARD_BYTES, side="right"))
        bounds.append(min(max(end, start + 1), start + most, len(ends)))
    return np.array(bounds)
