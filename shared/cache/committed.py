"""What a planner needs to know of the samples that are in a cache, as columns: some 80 bytes a sample.

Captions are kept as fingerprints, and where a clip comes from is read when it is asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.cache.identity import identity_numbers, identity_texts
from shared.cache.live import LiveRows, Rows, find_live, read_by_groups
from shared.cache.resolve import sample_numbers
from shared.cache.schema import ABOUT, WINDOW
from shared.fingerprints import Lookup, Numbers, fingerprints

_CLIP = ["source", "source_version", "start", "end"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Removed:
    """Samples that were removed once."""

    numbers: Numbers
    """(R, 2): their identities."""
    lookup: Lookup
    """Finds them."""
    generations: npt.NDArray[np.int32]
    """(R,): of the latest removal of each."""

    @classmethod
    def of(cls, generations: dict[str, int]) -> "Removed":
        """Returns the removals of samples by their identities."""
        numbers = identity_numbers(list(generations))
        return cls(numbers=numbers, lookup=Lookup(numbers), generations=np.array(list(generations.values()), np.int32))

    def by_sample(self) -> dict[str, int]:
        """Returns the removals by the identities of their samples."""
        return dict(zip(identity_texts(self.numbers), self.generations.tolist(), strict=True))

    def next_generations(self, numbers: Numbers) -> npt.NDArray[np.int32]:
        """Returns the generation (M,) in which samples (M, 2) are to be encoded."""
        if not len(self.numbers):
            return np.zeros(len(numbers), np.int32)
        found = self.lookup.find(numbers)
        return np.where(found < 0, 0, self.generations[found] + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedTexts:
    """The texts of one stream that samples (N,) have."""

    generations: npt.NDArray[np.int32]
    """(N,); -1 where a sample has none."""
    captions: npt.NDArray[np.uint64]
    """(N,): the sum of the fingerprints of its captions as the manifest gave them."""
    ends: Rows
    """(N,): the number of all captions up to its own."""
    ids: Numbers
    """(C, 2): the identities of the captions of all samples, one sample behind another."""

    def num_captions(self) -> Rows:
        """Returns how many captions (N,) each sample has."""
        return np.diff(self.ends, prepend=0)

    def ids_of(self, row: int) -> set[str]:
        """Returns the identities of a sample's captions."""
        return set(identity_texts(self.ids[self.ends[row - 1] if row else 0 : self.ends[row]]))


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedSamples:
    """The committed samples N of a cache."""

    numbers: Numbers
    """(N, 2): their identities."""
    lookup: Lookup
    """Finds them."""
    generations: npt.NDArray[np.int32]
    """(N,): of their latents."""
    texts: CommittedTexts
    removed: Removed
    cache: Cache
    live: LiveRows

    def __len__(self) -> int:
        return len(self.numbers)

    def samples(self) -> list[str]:
        """Returns the identities as they are written."""
        return identity_texts(self.numbers)

    def clips(self, rows: Rows) -> Iterator[tuple[Rows, pa.Table]]:
        """Reads of which clips samples were made.

        Args:
            rows: Of samples, ascending.

        Yields:
            Some of the samples after others: their rows (n,), and a table of as many rows with ``source``,
            ``source_version``, ``start`` and ``end``.
        """
        for table, ((part, places),) in read_by_groups(self.cache.store, self.live, [self.live.latent[rows]], _CLIP):
            yield rows[part], _complete(table).take(pa.array(places))


def read_committed(cache: Cache, text_stream: str) -> CommittedSamples:
    """Returns the committed samples of a cache.

    Args:
        cache: Opened.
        text_stream: Whose captions are wanted.

    Raises:
        InputError: if the index cannot be read.
    """
    live = find_live(cache, cache.index_files().paths())
    numbers = np.empty((len(live), 2), np.uint64)
    generations = np.empty(len(live), np.int32)
    wanted = ["sample", f"{layout.LATENT_STREAM}.generation"]
    for table, ((part, places),) in read_by_groups(cache.store, live, [live.latent], wanted):
        rows = table.take(pa.array(places))
        numbers[part] = sample_numbers(rows["sample"])
        generations[part] = _field(rows[layout.LATENT_STREAM], "generation").to_numpy()
    removed = sample_numbers(live.removed["sample"])
    return CommittedSamples(
        numbers=numbers,
        lookup=Lookup(numbers),
        generations=generations,
        texts=_read_texts(cache, live, text_stream),
        removed=Removed(
            numbers=removed,
            lookup=Lookup(removed),
            generations=live.removed["removed"].to_numpy().astype(np.int32),
        ),
        cache=cache,
        live=live,
    )


def caption_sums(captions: pa.ListArray | pa.LargeListArray) -> npt.NDArray[np.uint64]:
    """Returns for lists (N,) of different strings the sums (N,) of their fingerprints, 0 for an empty list."""
    sums = fingerprints(captions.flatten())
    lengths = pc.fill_null(pc.list_value_length(captions), 0).to_numpy().astype(np.int64)
    return _sums(sums, lengths)


def _sums(values: npt.NDArray[np.uint64], lengths: Rows) -> npt.NDArray[np.uint64]:
    ends = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return ends[bounds[1:]] - ends[bounds[:-1]]


def _read_texts(cache: Cache, live: LiveRows, stream: str) -> CommittedTexts:
    count = len(live)
    chosen = live.texts.get(stream, np.full(count, -1, np.int64))
    order = np.argsort(chosen, kind="stable")
    order = order[np.searchsorted(chosen[order], 0) :]
    generations = np.full(count, -1, np.int32)
    sums = np.zeros(count, np.uint64)
    lengths = np.zeros(count, np.int64)
    ids: list[Numbers] = [np.empty((0, 2), np.uint64)]
    wanted = [f"{stream}.generation", *(f"{stream}.captions.list.element.{name}" for name in ("id", "caption"))]
    for table, ((part, places),) in read_by_groups(cache.store, live, [chosen[order]], wanted):
        rows = order[part]
        for first in range(0, len(rows), 1 << 14):
            some = rows[first : first + (1 << 14)]
            column = table[stream].take(pa.array(places[first : first + (1 << 14)])).combine_chunks()
            captions = pc.struct_field(column, "captions")
            generations[some] = pc.struct_field(column, "generation").to_numpy(zero_copy_only=False)
            sums[some] = caption_sums(_of_field(captions, "caption"))
            lengths[some] = pc.fill_null(pc.list_value_length(captions), 0).to_numpy()
            ids.append(sample_numbers(pa.chunked_array([pc.struct_field(captions.flatten(), "id")])))
    found = np.concatenate(ids)
    ends = np.cumsum(lengths)
    if (order[1:] > order[:-1]).all():
        return CommittedTexts(generations=generations, captions=sums, ends=ends, ids=found)
    sources = np.empty(len(found), np.int64)  # from the order in which texts lie to that of the samples
    starts = ends - lengths
    counts = lengths[order]
    within = np.arange(len(found)) - np.repeat(np.cumsum(counts) - counts, counts)
    sources[np.repeat(starts[order], counts) + within] = np.arange(len(found))
    return CommittedTexts(generations=generations, captions=sums, ends=ends, ids=found[sources])


def _field(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    return pa.chunked_array([pc.struct_field(chunk, name) for chunk in column.chunks], column.type.field(name).type)


def _of_field(lists: pa.ListArray, name: str) -> pa.ListArray:
    """Returns lists of one field of the structs that they hold."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pc.struct_field(lists.flatten(), name))


def _complete(table: pa.Table) -> pa.Table:
    """Returns the columns that say of which clip a sample is; what a table lacks is null."""
    columns = []
    for name in _CLIP:
        kind = (ABOUT if name in ABOUT.names else WINDOW).field(name).type
        columns.append(table[name] if name in table.column_names else pa.nulls(table.num_rows, kind))
    return pa.table(columns, names=_CLIP)
