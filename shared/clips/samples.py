"""Which samples the clips of a manifest give: buckets, windows and identities, some thousand clips at a time."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.bucketing import ClipFacts, PerClip, fill, shortfall
from shared.cache.identity import latent_numbers
from shared.fingerprints import Numbers
from shared.media.clip import Clip, Window
from shared.media.manifest import Manifest
from shared.media.manifest.manifest import clip_of_row
from shared.spec import Bucket
from shared.windows import Integers, Sampling, num_windows, window_starts

_ROWS_AT_ONCE = 1 << 16
_MOST_PLACES = 2**31 - 1
"""Of a clip; its windows lie in these: where they start is kept, and written to the index, in 32 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Which of the samples of a clip in a bucket."""

    number: int
    """Of the window, see ``shared.windows``; 0 is in the middle."""
    flip: bool
    """Mirrored left to right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketSamples:
    """The samples of one bucket: of F clips, in V variants at most."""

    variants: tuple[Variant, ...]
    clips: Integers
    """(F,), rows of the manifest, ascending."""
    exists: npt.NDArray[np.bool_]
    """(F, V): long clips have more windows."""
    numbers: Numbers
    """(F, V, 2), their identities."""
    starts: npt.NDArray[np.int32]
    """(F, V), where their windows start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSamples:
    """The samples of a manifest."""

    by_bucket: tuple[BucketSamples, ...]
    """In the order of the buckets."""
    unfilled: Integers
    """Rows of clips that fill none of the buckets."""
    unusable: Integers
    """Rows of clips of which probing says that they cannot be used."""


class TakenRows:
    """Takes rows of a large table; Arrow itself would join all of it first.

    Args:
        table: In chunks.
    """

    def __init__(self, table: pa.Table) -> None:
        self._schema, self._batches = table.schema, table.to_batches(max_chunksize=_ROWS_AT_ONCE)
        self._ends = np.cumsum([len(batch) for batch in self._batches])

    def take(self, rows: Integers, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns some rows (n,), ascending; all columns by default."""
        names = self._schema.names if columns is None else list(columns)
        batch_of = np.searchsorted(self._ends, rows, side="right")
        pieces = [pa.Table.from_batches([], self._schema).select(names)]
        for number in np.unique(batch_of).tolist():
            batch = self._batches[number]
            local = rows[batch_of == number] - (int(self._ends[number]) - len(batch))
            pieces.append(pa.Table.from_batches([batch.select(names).take(pa.array(local))]))
        return pa.concat_tables(pieces)


class SampleMaker:
    """What tasks and refusals take from a manifest and its probes.

    Args:
        manifest: N clips.
        probes: (N rows), see ``shared.clips.probes.Probes.table_for``.
        sampling: How frames are taken.
    """

    def __init__(self, manifest: Manifest, probes: pa.Table, sampling: Sampling) -> None:
        assert manifest.table.num_rows == probes.num_rows, (manifest.table.num_rows, probes.num_rows)
        self.manifest, self.probes, self.sampling = manifest, probes, sampling
        self._rows, self._facts = TakenRows(manifest.table), TakenRows(probes)
        self._num_captions: npt.NDArray[np.int32] | None = None

    def clips(self, rows: Integers) -> list[Clip]:
        """Returns clips (n,), of ascending rows."""
        return [clip_of_row(row) for row in self._rows.take(rows).to_pylist()]

    def versions(self, rows: Integers) -> list[str]:
        """Returns the versions of the files of clips (n,), of ascending rows that can be used."""
        versions: list[str] = self._facts.take(rows, ["version"])["version"].to_pylist()
        return versions

    def rates(self, rows: Integers) -> list[float]:
        """Returns how many of the frames that are taken of clips (n,), of ascending rows, make a second."""
        if self.sampling.fps is not None:
            return [self.sampling.fps] * len(rows)
        parts = self._facts.take(rows, ["fps_num", "fps_den"]).to_pydict()
        rates = [Fraction(*rate) for rate in zip(parts["fps_num"], parts["fps_den"], strict=True)]
        return [float(rate / self.sampling.frame_interval) for rate in rates]

    def sources(self, rows: Integers) -> list[str]:
        """Returns the sources of clips (n,), of ascending rows."""
        sources: list[str] = self._rows.take(rows, ["source"])["source"].to_pylist()
        return sources

    def window(self, bucket: Bucket, variant: Variant, start: int) -> Window:
        """Returns a window of a bucket's frames."""
        return Window(
            start=start,
            num_frames=bucket.num_frames,
            interval=self.sampling.interval,
            fps=self.sampling.fps,
            flip=variant.flip,
        )

    def num_captions(self, rows: Integers) -> Integers:
        """Returns how many captions clips (n,) have."""
        if self._num_captions is None:
            chunks = self.manifest.table["captions"].chunks
            lengths = [pc.list_value_length(chunk).to_numpy(zero_copy_only=False) for chunk in chunks]
            self._num_captions = np.concatenate([np.empty(0, np.int32), *lengths]).astype(np.int32)
        return self._num_captions[rows].astype(np.int64)

    def faults(self, rows: Integers) -> list[tuple[str, str]]:
        """Returns why clips (n,), of ascending rows, cannot be used: reason and detail."""
        columns = self._facts.take(rows, ["reason", "detail"])
        return list(zip(columns["reason"].to_pylist(), columns["detail"].to_pylist(), strict=True))

    def shortfalls(self, rows: Integers, buckets: Sequence[Bucket]) -> Iterator[tuple[Bucket, str, str]]:
        """Yields why clips (n,), of ascending rows, fill none of the buckets: the smallest one, reason and detail."""
        facts = facts_of(self._facts.take(rows))
        columns = (facts.num_places(self.sampling), facts.height, facts.width, facts.is_image)
        known: dict[tuple[int, int, int, bool], tuple[Bucket, str, str]] = {}
        for key in zip(*(column.tolist() for column in columns), strict=True):
            if key not in known:
                num_places, height, width, is_image = key
                known[key] = shortfall(
                    num_places=num_places,
                    height=height,
                    width=width,
                    is_image=is_image,
                    buckets=buckets,
                    sampling=self.sampling,
                )
            yield known[key]

    def count_shortfalls(self, rows: Integers, buckets: Sequence[Bucket]) -> Counter[str]:
        """Returns how many of these clips (n,) fill none of the buckets for which reason."""
        return Counter(reason for some in _some(rows) for _, reason, _ in self.shortfalls(some, buckets))

    def count_faults(self, rows: Integers) -> Counter[str]:
        """Returns how many of these clips (n,) cannot be used for which reason."""
        reasons = self.probes["reason"].take(pa.array(rows)).value_counts()
        return Counter({str(entry["values"]): int(entry["counts"]) for entry in reasons.to_pylist()})


def variants_of(windows_per_clip: int, *, flip: bool) -> tuple[Variant, ...]:
    """Returns the variants of a clip that is long enough."""
    mirrored = (False, True) if flip else (False,)
    return tuple(Variant(number=number, flip=which) for number in range(windows_per_clip) for which in mirrored)


def facts_of(probes: pa.Table) -> ClipFacts:
    """Returns what decides which buckets probed clips fill; none of them may lack it."""
    return ClipFacts(
        num_frames=probes["num_frames"].to_numpy(),
        height=probes["height"].to_numpy(),
        width=probes["width"].to_numpy(),
        duration=probes["duration"].to_numpy(),
        is_image=probes["is_image"].to_numpy(),
    )


def find_samples(
    maker: SampleMaker,
    buckets: Sequence[Bucket],
    *,
    per_clip: PerClip,
    windows_per_clip: int,
    flip: bool,
    rows: Integers | None,
) -> FoundSamples:
    """Returns the samples that clips give.

    Args:
        maker: Manifest, probes and how frames are taken.
        buckets: Each once.
        per_clip: Into the best bucket that a clip fills, or into all.
        windows_per_clip: Windows of a clip, at most.
        flip: Whether each is wanted mirrored too.
        rows: Of the manifest, ascending, if only these are wanted.
    """
    variants = variants_of(windows_per_clip, flip=flip)
    parts: list[list[BucketSamples]] = [[] for _ in buckets]
    unfilled: list[Integers] = [np.empty(0, np.int64)]
    unusable: list[Integers] = [np.empty(0, np.int64)]
    for clips, sources, times, probes in _batches(maker, rows):
        is_probed = probes["version"].is_valid().to_numpy()
        is_usable = is_probed & probes["reason"].is_null().to_numpy()
        unusable.append(clips[probes["reason"].is_valid().to_numpy()])
        if not is_usable.all():
            usable = pa.array(is_usable)
            clips, sources, probes = clips[is_usable], sources.filter(usable), probes.filter(usable)
            times = times and times.filter(usable)
        facts = facts_of(probes)
        chosen, numbers = fill(facts, buckets, per_clip=per_clip, sampling=maker.sampling)
        is_unfilled = np.ones(len(clips), bool)
        is_unfilled[chosen] = False
        unfilled.append(clips[is_unfilled])
        texts = _Texts.of(sources, probes["version"].combine_chunks(), times)
        bounds = np.searchsorted(numbers, np.arange(len(buckets) + 1))
        num_places = np.minimum(facts.num_places(maker.sampling), _MOST_PLACES)
        for number, bucket in enumerate(buckets):
            some = chosen[bounds[number] : bounds[number + 1]]
            if len(some):
                made = _of_bucket(texts, clips, some, num_places[some], bucket, variants, maker.sampling)
                parts[number].append(made)
    return FoundSamples(
        by_bucket=tuple(_joined(samples, variants) for samples in parts),
        unfilled=np.concatenate(unfilled),
        unusable=np.concatenate(unusable),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Texts:
    """What of clips (n,) goes into identities."""

    sources: pa.Array
    versions: pa.Array
    times: pa.Array | None
    """As JSON; None where all clips are whole files."""
    is_whole: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, sources: pa.Array, versions: pa.Array, times: pa.Table | None) -> "_Texts":
        if times is None:
            return cls(sources=sources, versions=versions, times=None, is_whole=np.ones(len(sources), bool))
        starts, ends = times["start"].to_pylist(), times["end"].to_pylist()
        is_whole = np.array([start is None and end is None for start, end in zip(starts, ends, strict=True)], bool)
        written = [
            "null" if whole else json.dumps([start or 0.0, end], separators=(",", ":"))
            for start, end, whole in zip(starts, ends, is_whole, strict=True)
        ]
        return cls(sources=sources, versions=versions, times=pa.array(written, pa.string()), is_whole=is_whole)


def _batches(
    maker: SampleMaker, rows: Integers | None
) -> Iterator[tuple[Integers, pa.Array, pa.Table | None, pa.Table]]:
    """Yields some clips at a time: rows, sources, time ranges if there are any, probes."""
    table = maker.manifest.table
    has_times = any(table[name].null_count < table.num_rows for name in ("start", "end"))
    names = ["source", "start", "end"] if has_times else ["source"]
    wanted = table.select(names)
    if rows is not None:
        for some in _some(rows):
            part = wanted.take(pa.array(some))
            sources = _one(part["source"])
            yield some, sources, part if has_times else None, maker.probes.take(pa.array(some))
        return
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        part = wanted.slice(start, _ROWS_AT_ONCE)
        some = np.arange(start, start + part.num_rows)
        yield some, _one(part["source"]), part if has_times else None, maker.probes.slice(start, _ROWS_AT_ONCE)


def _some(rows: Integers) -> Iterator[Integers]:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        yield rows[start : start + _ROWS_AT_ONCE]


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _of_bucket(
    texts: _Texts,
    clips: Integers,
    some: Integers,
    num_places: Integers,
    bucket: Bucket,
    variants: Sequence[Variant],
    sampling: Sampling,
) -> BucketSamples:
    """Returns the samples that some clips give in one bucket."""
    span = sampling.span(bucket.num_frames)
    windows = num_windows(num_places, span, variants[-1].number + 1)
    shape = (len(some), len(variants))
    exists = np.zeros(shape, bool)
    starts = np.zeros(shape, np.int32)
    numbers = np.zeros((*shape, 2), np.uint64)
    for place, variant in enumerate(variants):
        has = windows > variant.number
        if not has.any():
            continue
        exists[:, place] = has
        starts[has, place] = window_starts(num_places[has], span, variant.number)
        numbers[has, place] = _identities(texts, some[has], bucket, variant, starts[has, place], sampling)
    return BucketSamples(variants=tuple(variants), clips=clips[some], exists=exists, numbers=numbers, starts=starts)


def _identities(
    texts: _Texts,
    some: Integers,
    bucket: Bucket,
    variant: Variant,
    starts: npt.NDArray[np.int32],
    sampling: Sampling,
) -> Numbers:
    places = pa.array(some)
    more = None
    is_plain = variant.number == 0 and not variant.flip and sampling.fps is None
    if not is_plain or texts.times is not None:
        times = pa.scalar("null") if texts.times is None else texts.times.take(places)
        rest = f",{json.dumps(sampling.fps)},"
        end = f",{json.dumps(variant.flip)}"
        more = pc.binary_join_element_wise(
            pa.scalar(","), times, pa.scalar(rest), pa.array(starts).cast(pa.string()), pa.scalar(end), pa.scalar("")
        )
        if is_plain:
            more = pc.if_else(pa.array(texts.is_whole[some]), pa.scalar(""), more)
    return latent_numbers(
        sources=texts.sources.take(places),
        source_versions=texts.versions.take(places),
        bucket=bucket,
        frame_interval=sampling.interval,
        more=more,
    )


def _joined(parts: Sequence[BucketSamples], variants: Sequence[Variant]) -> BucketSamples:
    shape = (0, len(variants))
    return BucketSamples(
        variants=tuple(variants),
        clips=np.concatenate([np.empty(0, np.int64), *(part.clips for part in parts)]),
        exists=np.concatenate([np.empty(shape, bool), *(part.exists for part in parts)]),
        numbers=np.concatenate([np.empty((*shape, 2), np.uint64), *(part.numbers for part in parts)]),
        starts=np.concatenate([np.empty(shape, np.int32), *(part.starts for part in parts)]),
    )
