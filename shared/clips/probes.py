"""What clips really are, kept in Parquet parts of a store: probed once, extended, never made anew.

A row says of a clip what was found where its media lay. Two data sets may have clips of equal names, so it says nothing
of a clip that lies elsewhere; only, if that is a file of the same version, the clip is not probed anew. Of several rows
of one clip and place the one of the highest sequence number counts. ``shared.clips.probe_parts`` keeps the files.

Clips that cannot be used have rows too, with the reason, if it lasts: what may pass, such as a lost connection or a
missing file, is not stored.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.clips.probe_parts import SCHEMA, ProbeParts, clip_keys, place_keys
from shared.clips.probe_rows import ProbeRows
from shared.fingerprints import Lookup, Numbers, fingerprints
from shared.media.clip import Media, TimeRange
from shared.media.manifest import Manifest
from shared.media.probe import Probe, file_version, probe
from shared.media.refusal import MediaError
from shared.media.sources import stamp
from shared.stores.store import Store
from shared.windows import Integers

PASSING_REASONS = frozenset({"missing", "not_readable", "decoder_lost"})
"""Why a clip cannot be used now and perhaps can on the next run."""

_FACTS = ["version", "num_frames", "height", "width", "fps_num", "fps_den", "duration", "is_image", "reason", "detail"]
_PLAIN_FACTS = ("version", "num_frames", "height", "width", "duration", "rotation", "is_image", "codec")
_KNOWN = [*_FACTS, "rotation", "codec", "stamp"]
FILES_A_TASK = 16
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class FileToProbe:
    """A file and the clips that are in it."""

    source: str
    media: Media
    ranges: tuple[TimeRange | None, ...]
    """At least one."""
    stamp: str | None = None
    """If it was probed before and is only to be probed again if it changed: its stamp then."""
    facts: tuple[Probe, ...] = ()
    """If a file of its name was probed elsewhere: what was found of each of the ranges. Holds for this one if its
    version is the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeTask:
    """Some files to be probed by one worker."""

    files: tuple[FileToProbe, ...]

    @property
    def num_clips(self) -> int:
        """Clips that are in them."""
        return sum(len(file.ranges) for file in self.files)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbedClip:
    """What probing found of one clip."""

    source: str
    media: Media
    time_range: TimeRange | None
    stamp: str | None
    """None where the file could not be read."""
    facts: Probe | None
    """None for a clip that cannot be used."""
    reason: str | None = None
    detail: str | None = None
    transient: bool = False
    """Whether the reason may pass."""


def probe_file(file: FileToProbe) -> list[ProbedClip]:
    """Returns what probing finds of each clip of a file, nothing if the file has not changed since it was probed.

    A file that lies elsewhere now may have another time of change and be the same, and the other way round.
    """
    try:
        found = stamp(file.media)
        if found == file.stamp:
            return []
        is_same = file.facts and file.facts[0].version == file_version(file.media)
        facts = file.facts if is_same else probe(file.media, file.ranges)
    except MediaError as error:
        return refused_file(file, error.reason, error.detail, transient=error.transient)
    return [
        ProbedClip(source=file.source, media=file.media, time_range=time_range, stamp=found, facts=part)
        for time_range, part in zip(file.ranges, facts, strict=True)
    ]


def refused_file(file: FileToProbe, reason: str, detail: str, *, transient: bool = False) -> list[ProbedClip]:
    """Returns that no clip of a file can be used, and why."""
    try:
        found = stamp(file.media)
    except MediaError:
        found = None
    passes = transient or reason in PASSING_REASONS
    return [
        ProbedClip(
            source=file.source,
            media=file.media,
            time_range=time_range,
            stamp=found,
            facts=None,
            reason=reason,
            detail=detail,
            transient=passes,
        )
        for time_range in file.ranges
    ]


class Probes:
    """The probes in a store. Build it with :meth:`open`."""

    def __init__(self, store: Store) -> None:
        self._parts = ProbeParts(store)
        self._loaded: ProbeRows | None = None
        self._keys: tuple[pa.Table, Numbers] | None = None

    @classmethod
    def open(cls, store: Store) -> "Probes":
        """Opens the probes whose parts lie at a store's root, e.g. at ``open_store(f"{cache}/probes")``."""
        return cls(store)

    def missing(
        self, manifest: Manifest, *, check_stamps: bool = False, retry_refused: Collection[str] = ()
    ) -> "ProbeTasks":
        """Returns what is to be probed, the clips of one file together, in the manifest's order.

        Files that could not be used are looked at: they may have been mended. So are those of whose name one was
        probed elsewhere.

        Args:
            manifest: Whose clips are wanted.
            check_stamps: Look at all other files too, and probe again those that changed since they were probed.
            retry_refused: Probe clips again that could not be used for these reasons.

        Raises:
            InputError: if a part cannot be read.
        """
        loaded, keys = self._load(), self._keys_of(manifest)
        places = loaded.find(keys)
        is_here = places >= 0
        wanted = ~is_here
        if retry_refused:
            wanted |= loaded.is_refused(retry_refused)[places]
        looked = ~wanted & (check_stamps | loaded.is_refused()[places])
        rows = np.flatnonzero(wanted | looked)
        if not len(loaded.by_place) or not len(rows):
            return ProbeTasks(manifest, rows)
        del loaded
        self._loaded = None  # what is known of these clips is read next, and needs the memory
        clips, is_here = clip_keys(manifest.table)[rows], is_here[rows]
        known = ProbeRows.load(self._parts, _KNOWN, among=Lookup(clips))
        places = np.where(looked[rows], known.find(keys[rows]), -1)
        places[~is_here] = known.find_by_name(clips[~is_here])
        places[~is_here & known.is_refused()[places]] = -1
        columns = {name: known.facts[name].combine_chunks() for name in _KNOWN}
        return ProbeTasks(manifest, rows, _Known(rows=places, is_here=is_here, columns=columns))

    def refused(self, manifest: Manifest) -> Counter[str]:
        """Returns how many clips of a manifest cannot be used, by reason.

        Raises:
            InputError: if a part cannot be read.
        """
        loaded = self._load()
        places = loaded.find(self._keys_of(manifest))
        reasons = loaded.facts["reason"].take(pa.array(places[places >= 0]))
        return Counter({found["values"]: found["counts"] for found in pc.value_counts(reasons.drop_null()).to_pylist()})

    def again(self, manifest: Manifest, sources: Collection[str]) -> "ProbeTasks":
        """Returns what is to be done to probe these sources of a manifest again, whether they changed or not."""
        return ProbeTasks(manifest, rows_of_sources(manifest, sources))

    def add(self, clips: Iterable[ProbedClip]) -> int:
        """Stores what probing found, durably on return, and returns of how many clips; what may pass is not stored."""
        kept = [clip for clip in clips if not clip.transient]
        if not kept:
            return 0
        number = self._parts.next_sequence()
        self._parts.write(pa.Table.from_pylist([_row(clip, number) for clip in kept], schema=SCHEMA))
        self._loaded = None
        self._parts.merge()
        return len(kept)

    def table_for(self, manifest: Manifest) -> pa.Table:
        """Returns what is known of the clips of a manifest, a row each: ``version``, ``num_frames``, ``height``,
        ``width``, ``fps_num``, ``fps_den``, ``duration``, ``is_image``, ``reason`` and ``detail``. All are null for a
        clip that is not probed where it lies.

        Raises:
            InputError: if a part cannot be read.
        """
        loaded = self._load()
        self._loaded = None  # a plan comes next, and needs the memory
        facts = loaded.facts.select(_FACTS)
        places = loaded.find(self._keys_of(manifest))
        if len(places) == facts.num_rows and (places == np.arange(len(places))).all():
            return facts
        pieces = [facts.schema.empty_table()]
        for start in range(0, len(places), _ROWS_AT_ONCE):
            some = places[start : start + _ROWS_AT_ONCE]
            pieces.append(facts.take(pa.array(some, mask=some < 0)))
        return pa.concat_tables(pieces)

    def _keys_of(self, manifest: Manifest) -> Numbers:
        if self._keys is None or self._keys[0] is not manifest.table:
            self._keys = manifest.table, place_keys(manifest.table)
        return self._keys[1]

    def _load(self) -> ProbeRows:
        if self._loaded is None:
            self._loaded = ProbeRows.load(self._parts, _FACTS)
        return self._loaded


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """What is known of clips (n,) that are looked at."""

    rows: Integers
    """(n,), of ``facts``; -1 for those that are probed in any case."""
    is_here: npt.NDArray[np.bool_]
    """(n,), whether they were probed where they lie."""
    columns: dict[str, pa.Array]
    """Of facts, and ``stamp``."""


class ProbeTasks(Sequence[ProbeTask]):
    """Files to be probed, each task made when it is asked for.

    Args:
        manifest: Of which they are.
        rows: (n,), of its clips, ascending.
        known: Of them, if files are looked at before they are probed.
    """

    def __init__(self, manifest: Manifest, rows: Integers, known: _Known | None = None) -> None:
        self._clips = manifest.clips
        starts = np.arange(len(rows))
        table = manifest.table
        if any(table[name].null_count < table.num_rows for name in ("start", "end")):
            keys = fingerprints(table["source"])[rows]
            _, first, file_of = np.unique(keys, return_index=True, return_inverse=True)
            order = np.argsort(first[file_of], kind="stable")
            rows = rows[order]
            starts = np.flatnonzero(np.diff(first[file_of][order], prepend=-1))
            known = known and _Known(rows=known.rows[order], is_here=known.is_here[order], columns=known.columns)
        self._rows, self._known, self._bounds = rows, known, np.append(starts, len(rows))

    @property
    def num_clips(self) -> int:
        """Clips of all tasks."""
        return len(self._rows)

    def __len__(self) -> int:
        return -(-(len(self._bounds) - 1) // FILES_A_TASK)

    @overload
    def __getitem__(self, place: int) -> ProbeTask: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ProbeTask]: ...
    def __getitem__(self, place: int | slice) -> ProbeTask | Sequence[ProbeTask]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        first = range(len(self))[place] * FILES_A_TASK
        bounds = self._bounds[first : first + FILES_A_TASK + 1].tolist()
        return ProbeTask(files=tuple(self._file(start, end) for start, end in pairwise(bounds)))

    def _file(self, start: int, end: int) -> FileToProbe:
        clips = [self._clips[row] for row in self._rows[start:end].tolist()]
        file = FileToProbe(
            source=clips[0].source, media=clips[0].media, ranges=tuple(clip.time_range for clip in clips)
        )
        known = self._known
        if known is None or (known.rows[start:end] < 0).any():
            return file
        is_here = known.is_here[start:end]
        rows = [
            {name: column[row].as_py() for name, column in known.columns.items()}
            for row in known.rows[start:end].tolist()
        ]
        if is_here.all():
            stamps = {row["stamp"] for row in rows}
            return replace(file, stamp=stamps.pop() if len(stamps) == 1 else None)
        is_one = len({row["version"] for row in rows}) == 1
        return replace(file, facts=tuple(map(_facts_of, rows))) if is_one and not is_here.any() else file


def rows_of_sources(manifest: Manifest, sources: Collection[str]) -> Integers:
    """Returns the rows (n,) of a manifest whose clips are of these sources."""
    wanted = pa.array(list(sources), manifest.table["source"].type)
    return np.flatnonzero(pc.is_in(manifest.table["source"], wanted).to_numpy())


def _row(clip: ProbedClip, sequence: int) -> dict[str, Any]:
    facts = clip.facts
    row: dict[str, Any] = {
        "source": clip.source,
        "start": clip.time_range and clip.time_range.start,
        "end": clip.time_range and clip.time_range.end,
        "url": clip.media.url,
        "offset": clip.media.offset,
        "size": clip.media.size,
        "stamp": clip.stamp,
        "reason": clip.reason,
        "detail": clip.detail,
        "sequence": sequence,
    }
    if facts is not None:
        row["fps_num"], row["fps_den"] = facts.fps.numerator, facts.fps.denominator
        row.update((name, getattr(facts, name)) for name in _PLAIN_FACTS)
    return row


def _facts_of(row: dict[str, Any]) -> Probe:
    return Probe(
        fps=Fraction(row["fps_num"], row["fps_den"]),
        **{name: row[name] for name in _PLAIN_FACTS},
    )
