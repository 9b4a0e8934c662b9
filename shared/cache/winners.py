"""Which rows of a large index count, found from identities and generations as numbers.

A row that is the only one of its sample, and brings its latent, counts as it stands; ``shared.cache.resolve`` decides
on the others, some at a time.
"""

import binascii
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache.layout import LATENT_STREAM
from shared.cache.resolve import resolve, sample_numbers
from shared.cache.schema import REMOVED

Rows = npt.NDArray[np.int64]

_RESOLVED_AT_ONCE = 1 << 20
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowNumbers:
    """The rows M of fragments of samples."""

    identity: npt.NDArray[np.uint64]
    """(M, 2), of their samples."""
    generations: dict[str, npt.NDArray[np.int32]]
    """By stream (M,); -1 where a row does not bring the stream."""
    removed: npt.NDArray[np.int32]
    """(M,): the generation at which a row removes its sample, -1 where it does not."""

    def __len__(self) -> int:
        return len(self.identity)

    @classmethod
    def of_table(cls, table: pa.Table, streams: Sequence[str]) -> "RowNumbers":
        """Returns the numbers of rows with the columns ``sample``, ``removed`` and, of streams, ``generation``."""

        def integers(name: str, field: str | None) -> npt.NDArray[np.int32]:
            if name not in table.column_names:
                return np.full(table.num_rows, -1, np.int32)
            chunks = [pc.struct_field(chunk, field) if field else chunk for chunk in table[name].chunks]
            return pc.fill_null(pa.chunked_array(chunks, pa.int32()), -1).to_numpy()

        return cls(
            identity=sample_numbers(table["sample"]),
            generations={stream: integers(stream, "generation") for stream in streams},
            removed=integers(REMOVED.name, None),
        )

    @classmethod
    def joined(cls, parts: Sequence["RowNumbers"], streams: Sequence[str]) -> "RowNumbers":
        """Returns rows one behind another."""
        none = np.empty(0, np.int32)
        return cls(
            identity=np.concatenate([np.empty((0, 2), np.uint64), *(part.identity for part in parts)]),
            generations={
                stream: np.concatenate([none, *(part.generations[stream] for part in parts)]) for stream in streams
            },
            removed=np.concatenate([none, *(part.removed for part in parts)]),
        )

    def samples(self, rows: Rows) -> pa.LargeStringArray:
        """Returns the identities of some rows as they are written."""
        digits = binascii.hexlify(self.identity[rows].astype(">u8").tobytes())
        offsets = np.arange(0, 32 * len(rows) + 1, 32, dtype=np.int64)
        return pa.LargeStringArray.from_buffers(len(rows), pa.py_buffer(offsets), pa.py_buffer(digits))

    def resolved(self, rows: Rows) -> dict[str, Rows]:
        """Returns what :func:`winning_rows` does, of some rows (ascending) that have all rows of their samples."""
        columns = {"sample": self.samples(rows), REMOVED.name: _integers(self.removed[rows])}
        for stream, generations in self.generations.items():
            values = generations[rows]
            columns[stream] = pa.StructArray.from_arrays(
                [_integers(values), pa.array(rows)], ["generation", "row"], mask=pa.array(values < 0)
            )
        table = resolve(pa.table(columns))
        return {
            stream: pc.fill_null(
                pa.chunked_array([pc.struct_field(chunk, "row") for chunk in table[stream].chunks], pa.int64()), -1
            ).to_numpy()
            for stream in self.generations
        }


def winning_rows(numbers: RowNumbers) -> dict[str, Rows]:
    """Returns by stream (N,) the numbers of the rows that count of the live samples N, -1 where there is none.

    The samples stand in the order of the rows that bring their latents.
    """
    is_open = (numbers.generations[LATENT_STREAM] < 0) | (numbers.removed >= 0) | _repeated(numbers.identity)
    is_base = ~is_open
    rows = np.flatnonzero(is_open)
    del is_open
    chosen = {
        stream: np.where(generations >= 0, np.arange(len(numbers)), -1)
        for stream, generations in numbers.generations.items()
        if stream != LATENT_STREAM
    }
    num_parts = -(-len(rows) // _RESOLVED_AT_ONCE)
    part_of = numbers.identity[rows, 1] % np.uint64(max(1, num_parts))
    for part in range(num_parts):
        winners = numbers.resolved(rows[part_of == part])
        base = winners[LATENT_STREAM]
        is_base[base] = True
        for stream, column in chosen.items():
            column[base] = winners[stream]
    latent = np.flatnonzero(is_base)
    return {LATENT_STREAM: latent, **{stream: column[latent] for stream, column in chosen.items()}}


def _integers(values: npt.NDArray[np.int32]) -> pa.Array:
    return pa.array(values, mask=values < 0)


def _repeated(identity: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Returns (M,) which identities occur more than once; a few others may be among them."""
    keys = identity[:, 0] * _ODD ^ identity[:, 1]
    order = np.argsort(keys)
    keys = keys[order]
    equal = keys[1:] == keys[:-1]
    result = np.zeros(len(keys), bool)
    result[order[1:][equal]] = True
    result[order[:-1][equal]] = True
    return result
