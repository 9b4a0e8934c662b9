"""Rows of one (source, start, end) become one clip with all their captions, in the order in which they came first.

Rows lie in files meanwhile. In memory are the sources while they are numbered, and some numbers a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from shared.media.manifest.rows import Spill
from shared.media.manifest.values import ColumnKind

SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("url", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("captions", pa.list_(pa.string())),
    ]
)
"""One row a clip; ``columns``, a struct, where the manifest says more."""
_PIECE_BYTES = 512 * 1024 * 1024
OTHER = "column:"
"""Before the names of the manifest's further columns, while they lie beside ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Which rows are one clip."""

    is_first: np.ndarray
    """(rows,) bool: the first row of its clip."""
    rows: np.ndarray
    """(rows,) row numbers, sorted by clip; those of one clip in their order."""
    begins: np.ndarray
    """(clips + 1,) where in ``rows`` each clip begins."""


def group_rows(sources: list[pa.Array], starts: list[np.ndarray], ends: list[np.ndarray]) -> Groups | None:
    """Returns which rows are one clip, or None if every row is one of its own. Takes the sources out of the list.

    Args:
        sources: Chunks of all rows' sources.
        starts: Chunks of their starts in seconds, NaN where there are none.
        ends: Likewise.
    """
    if not any(map(len, sources)):
        return None
    chunked = pa.chunked_array(sources)
    sources.clear()
    encoded = chunked.dictionary_encode()
    del chunked
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks]).astype(np.int64)
    num_sources = len(encoded.chunk(0).dictionary)
    del encoded
    num_rows = len(codes)
    if num_sources == num_rows:
        return None
    all_starts, all_ends = (np.nan_to_num(np.concatenate(chunks), nan=-1.0) for chunks in (starts, ends))
    order = np.lexsort((all_ends, all_starts, codes))
    is_new = np.ones(num_rows, bool)
    sorted_keys = [key[order] for key in (codes, all_starts, all_ends)]
    is_new[1:] = np.any([key[1:] != key[:-1] for key in sorted_keys], axis=0)
    first_rows = order[is_new]
    if len(first_rows) == num_rows:
        return None
    clip_of_row = np.empty(num_rows, np.int64)
    clip_of_row[order] = np.argsort(np.argsort(first_rows))[np.cumsum(is_new) - 1]
    is_first = np.zeros(num_rows, bool)
    is_first[first_rows] = True
    counts = np.bincount(clip_of_row, minlength=len(first_rows))
    return Groups(
        is_first=is_first,
        rows=np.argsort(clip_of_row, kind="stable"),
        begins=np.concatenate([[0], np.cumsum(counts)]),
    )


def merged(spill: Spill, groups: Groups | None, kinds: dict[str, ColumnKind]) -> Iterator[pa.RecordBatch]:
    """Yields the clips: SCHEMA, and ``columns`` if there are further ones.

    Args:
        spill: The rows.
        groups: Which of them are one clip.
        kinds: What the further columns are, by name.
    """
    mapped = [] if groups is None else spill.mapped()
    ends = np.cumsum([len(batch) for batch in mapped])
    row = clip = 0
    for batch in spill.batches():
        if not len(batch):
            continue
        captions = batch.column("captions")
        if groups is not None:
            is_first = groups.is_first[row : row + len(batch)]
            row += len(batch)
            batch = batch.filter(pa.array(is_first))
            begins = groups.begins[clip : clip + len(batch) + 1]
            clip += len(batch)
            rows = groups.rows[begins[0] : begins[-1]]
            if len(rows) == len(batch):
                captions = captions.filter(pa.array(is_first))
            else:
                captions = _merged_captions(_gather(mapped, ends, rows), begins - begins[0])
        yield from _pieces(batch, captions, kinds)


def _pieces(batch: pa.RecordBatch, captions: pa.Array, kinds: dict[str, ColumnKind]) -> Iterator[pa.RecordBatch]:
    """Yields a batch's clips, in pieces whose captions are within the reach of Arrow's 32-bit offsets."""
    schema = SCHEMA
    arrays = [batch.column(name) if name != "captions" else captions for name in SCHEMA.names]
    if kinds:
        columns = [kind.convert(batch.column(f"{OTHER}{name}")) for name, kind in kinds.items()]
        arrays.append(pa.StructArray.from_arrays(columns, names=list(kinds)))
        schema = SCHEMA.append(pa.field("columns", arrays[-1].type))
    step = -(-len(batch) // (1 + captions.nbytes // _PIECE_BYTES)) or 1
    for begin in range(0, len(batch), step):
        parts = [array.slice(begin, step).cast(field.type) for array, field in zip(arrays, schema, strict=True)]
        yield pa.RecordBatch.from_arrays(parts, schema=schema)


def _gather(batches: list[pa.RecordBatch], ends: np.ndarray, rows: np.ndarray) -> list[list[str]]:
    """Returns the captions of some rows."""
    found = np.empty(len(rows), object)
    batch_of_row = np.searchsorted(ends, rows, side="right")
    order = np.argsort(batch_of_row, kind="stable")
    bounds = np.flatnonzero(np.diff(batch_of_row[order], prepend=-1, append=-1))
    for begin, end in pairwise(bounds.tolist()):
        number = int(batch_of_row[order[begin]])
        first = int(ends[number]) - len(batches[number])
        places = order[begin:end]
        for place, texts in zip(
            places.tolist(),
            batches[number].column("captions").take(pa.array(rows[places] - first)).to_pylist(),
            strict=True,
        ):
            found[place] = texts
    return found.tolist()


def _merged_captions(captions: list[list[str]], begins: np.ndarray) -> pa.Array:
    merged_texts = [
        list(dict.fromkeys(text for texts in captions[begin:end] for text in texts))
        for begin, end in pairwise(begins.tolist())
    ]
    return pa.array(merged_texts, pa.list_(pa.large_string()))
