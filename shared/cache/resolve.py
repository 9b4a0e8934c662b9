"""Which rows of the index count. Pure over tables.

Every fragment sets streams of samples at a *generation*: 0 when a sample is encoded first, one more for each time that
it is encoded again. For each sample and stream the highest generation counts, and of equal ones the row that stands
first. A removal at generation g takes away whatever has a generation of g or less.
"""

import binascii

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache.layout import LATENT_STREAM, is_text
from shared.cache.schema import REMOVED
from shared.errors import InputError

_TAKEN_AT_ONCE = 1 << 16


def resolve(table: pa.Table) -> pa.Table:
    """Returns one row a sample, in the order of the rows that bring the latents.

    Args:
        table: Rows of fragments, one fragment behind another, in the order by which equal generations are decided.
            The columns ``sample`` and, of each stream, at least the field ``generation``.

    Returns:
        The same columns without ``removed``. Texts that a sample does not have are null.
    """
    if table.num_rows == 0:
        return table.select([name for name in table.column_names if name != REMOVED.name])
    texts = [name for name in table.column_names if is_text(name)]
    latent = _generations(table, LATENT_STREAM)
    numbers = sample_numbers(table["sample"])
    removed = _removed(table)
    kept = [name for name in table.column_names if name != REMOVED.name]
    if (latent >= 0).all() and (removed < 0).all() and _distinct(numbers):
        return table.select(kept)
    groups, num_groups = _group(numbers)
    removed_at = np.full(num_groups, -1, np.int64)
    np.maximum.at(removed_at, groups, removed)
    winners = _winners(groups, latent, removed_at)
    base = np.sort(winners[winners >= 0])
    counts = np.zeros(table.num_rows, bool)
    counts[base] = True
    result = table.filter(pa.array(counts)).select(kept)
    for stream in texts:
        chosen = _winners(groups, _generations(table, stream), removed_at)[groups[base]]
        if (chosen != base).any():
            column = _taken(table[stream], chosen)
            result = result.set_column(result.column_names.index(stream), stream, column)
    return result


def _taken(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """Returns the values at these rows, null where one is negative; some at a time, as Arrow joins what it takes from,
    and strings of more than 2 GiB cannot be joined."""
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    pieces = []
    for start in range(0, len(rows), _TAKEN_AT_ONCE):
        part = rows[start : start + _TAKEN_AT_ONCE]
        chunks = np.where(part < 0, 0, np.searchsorted(ends, part, side="right"))
        needed = np.unique(chunks)
        starts = np.concatenate([[0], ends[:-1]])[needed]
        lengths = ends[needed] - starts
        moved = np.cumsum(lengths) - lengths - starts  # from rows of the column to rows of the needed chunks
        places = part + moved[np.searchsorted(needed, chunks)]
        source = pa.chunked_array([column.chunk(int(number)) for number in needed], column.type)
        pieces.extend(source.take(pa.array(places, mask=part < 0)).chunks)
    return pa.chunked_array(pieces, column.type)


def sample_numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Returns sample identities (N,) of 32 hex digits as numbers (N, 2) uint64.

    Raises:
        InputError: if one has another form.
    """
    parts = []
    for chunk in column.chunks:
        values = chunk.cast(pa.large_string()) if pa.types.is_string(chunk.type) else chunk
        if len(values) == 0:
            continue
        lengths = pc.binary_length(values)
        if values.null_count or pc.min(lengths).as_py() != 32 or pc.max(lengths).as_py() != 32:
            raise InputError("the index has samples that are not 32 hex digits: run preprocess.verify")
        _, offsets, data = values.buffers()
        start = int(np.frombuffer(offsets, np.int64)[values.offset])
        try:
            binary = binascii.unhexlify(memoryview(data)[start : start + 32 * len(values)])
        except ValueError:
            raise InputError("the index has samples that are not 32 hex digits: run preprocess.verify") from None
        parts.append(np.frombuffer(binary, ">u8").astype(np.uint64).reshape(-1, 2))
    return np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)


def _generations(table: pa.Table, stream: str) -> np.ndarray:
    """Returns the generation (N,) of a stream's rows, -1 where a row does not bring the stream."""
    if stream not in table.column_names:
        return np.full(table.num_rows, -1, np.int64)
    return _integers(
        pa.chunked_array([pc.struct_field(chunk, "generation") for chunk in table[stream].chunks], pa.int32())
    )


def _removed(table: pa.Table) -> np.ndarray:
    if REMOVED.name not in table.column_names:
        return np.full(table.num_rows, -1, np.int64)
    return _integers(table[REMOVED.name])


def _integers(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column, -1).to_numpy().astype(np.int64)


def _distinct(numbers: np.ndarray) -> bool:
    """Returns whether no identity occurs twice; their first 64 bits are looked at first."""
    first = np.sort(numbers[:, 0])
    return bool((first[1:] != first[:-1]).all()) or len(np.unique(numbers, axis=0)) == len(numbers)


def _group(numbers: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns for each identity the number of its group of equal ones, and the number of groups."""
    order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    ordered = numbers[order]
    is_new = np.ones(len(ordered), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    groups = np.empty(len(ordered), np.int64)
    groups[order] = is_new.cumsum() - 1
    return groups, int(is_new.sum())


def _winners(groups: np.ndarray, generations: np.ndarray, removed_at: np.ndarray) -> np.ndarray:
    """Returns for each group the row whose generation counts, -1 where there is none."""
    rows = np.flatnonzero((generations >= 0) & (generations > removed_at[groups]))
    order = rows[np.lexsort((rows, -generations[rows], groups[rows]))]
    winners = np.full(len(removed_at), -1, np.int64)
    is_first = np.ones(len(order), bool)
    is_first[1:] = groups[order][1:] != groups[order][:-1]
    winners[groups[order[is_first]]] = order[is_first]
    return winners
