"""Which rows of the index are variants of one clip, and the order in which ``train.variants`` finds them.

Which of a clip's variants is number 0 does not matter, but clips that are read together should number theirs alike.
Shards hold one window each, and those of other windows the same clips: so variants are numbered by their shards.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from train.index_columns import Array
from train.permutation import hash_words
from train.variants import ClipGroup
from train.where import hash_strings

_TEXTS = ("source", "source_version")
_NUMBERS = ("start", "end", "frame_interval", "sampling_fps")

CLIP_COLUMNS = (*_TEXTS, *_NUMBERS)
"""What tells clips apart; those behind ``source_version`` may be missing or null."""


def has_variants(schema: pa.Schema) -> bool:
    """Returns whether an index with these columns may hold several variants of a clip."""
    return "window" in schema.names or "flip" in schema.names


def clip_numbers(table: pa.Table) -> Array:
    """Returns a hash (N,) uint64 of the clip of each row: variants of a clip differ in nothing but window and flip.

    Files that changed, parts of a file and other rates of frames are other clips.
    """
    parts: list[Array] = []
    for name in _TEXTS:
        parts.append(hash_strings(table[name]))
    for name in _NUMBERS:
        values = _numbers(table, name)
        parts.append(np.asarray(pc.fill_null(values, 0.0)).view(np.uint64))
        parts.append(np.asarray(pc.is_valid(values)))
    return hash_words(*parts)


def _numbers(table: pa.Table, name: str) -> pa.Array:
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.float64())
    return table[name].cast(pa.float64()).combine_chunks()


def order_by_variant(
    packed: Array, clip: Array, shard: Array, offset: Array
) -> tuple[Array, dict[int, list[ClipGroup]]]:
    """Returns the rows in order, and the clips of each bucket.

    The order is by bucket, number of the clip's variants (most first), variant, and then by where the clip's variant 0
    is stored. Where no clip has several variants, that is storage order.

    Args:
        packed: (N,) the buckets.
        clip: (N,) see :func:`clip_numbers`.
        shard: (N,) where the row's latent lies,
        offset: (N,) and where in there.
    """
    rows = np.lexsort((offset, shard, clip, packed))
    same = np.zeros(len(rows), bool)
    same[1:] = clip[rows[1:]] == clip[rows[:-1]]
    same[1:] &= packed[rows[1:]] == packed[rows[:-1]]
    firsts = np.flatnonzero(~same)
    num_variants = np.diff(firsts, append=len(rows))
    leading = rows[firsts]
    clips = np.lexsort((offset[leading], shard[leading], -num_variants, packed[leading]))
    firsts, num_variants, buckets = firsts[clips], num_variants[clips], packed[leading[clips]]
    begins = np.flatnonzero((np.diff(num_variants, prepend=0) != 0) | (np.diff(buckets, prepend=-1) != 0))
    order: list[Array] = []
    groups: dict[int, list[ClipGroup]] = {}
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(firsts)], strict=True):
        variants = int(num_variants[begin])
        order.append(rows[firsts[begin:end] + np.arange(variants)[:, None]].ravel())
        groups.setdefault(int(buckets[begin]), []).append(ClipGroup(num_clips=end - begin, num_variants=variants))
    return np.concatenate(order), groups
