"""From the index of a cache to columns in storage order, a row group at a time.

What is read is kept as numbers, in files; of the whole index only what the order depends on is in memory at once.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache.dataset import Cache
from shared.cache.layout import LATENT_STREAM
from shared.cache.live import LiveRows, read_by_groups
from shared.cache.resolve import sample_numbers
from shared.cache.winners import Rows
from shared.errors import InputError
from shared.spec import Bucket
from shared.wording import counted
from train.clip_order import CLIP_COLUMNS, clip_numbers, has_variants, order_by_variant
from train.index_columns import IMAGE_FPS, Array, Spool, save_column
from train.variants import ClipGroup

PLACE = ("shard", "offset", "bytes", "crc32c", "codec")
_SIZE_BITS = 21


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltIndex:
    """What there is to know of columns."""

    shards: list[str]
    codecs: list[str]
    buckets: list[dict[str, Any]]
    """``bucket``, ``first_row``, ``groups`` (number of clips, of their variants), ``fps`` (median),
    ``latent_shape``; by bucket."""
    digest: str
    """Of the samples' identities and places: the plan of a run depends on them."""


def index_paths(text_stream: str) -> list[str]:
    """Returns the Parquet paths that :func:`build_columns` needs of every index."""
    captions = f"{text_stream}.captions.list.element"
    return [
        *("sample", "num_frames", "height", "width", "fps", f"{LATENT_STREAM}.shape"),
        *(f"{LATENT_STREAM}.{name}" for name in PLACE),
        *(f"{captions}.{name}" for name in (*PLACE, "num_tokens")),
        f"{text_stream}.channels",
    ]


def build_columns(
    cache: Cache, live: LiveRows, positions: Rows, text_stream: str, folder: Path, *, by_clip: bool
) -> BuiltIndex:
    """Writes the columns of live samples, in order, into a folder: see ``IndexColumns``.

    Args:
        cache: Opened.
        live: Its live rows.
        positions: Of the live samples that are taken (at least one), ascending.
        text_stream: Whose captions are taken.
        folder: Is there and has room for the columns and as much again while they are made.
        by_clip: Put the variants of each clip where ``train.variants`` finds them; else each sample is a clip.

    Raises:
        InputError: if a sample lacks its texts, texts are not as the provenance says, or a bucket's latents differ in
            shape.
    """
    codes = _Dictionary(), _Dictionary()
    by_clip = by_clip and has_variants(live.schema)
    with Spool(folder) as spool:
        num_captions, first_caption = _spool_rows(cache, live, positions, text_stream, spool, codes, by_clip)
        _require_texts(num_captions, text_stream, spool)
        return _save_in_order(folder, spool, codes, num_captions, first_caption, by_clip)


class _Dictionary:
    """Strings as numbers."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def encode(self, column: pa.Array) -> Array:
        encoded = column.dictionary_encode() if not pa.types.is_dictionary(column.type) else column
        numbers = [self._numbers.setdefault(name, len(self._numbers)) for name in encoded.dictionary.to_pylist()]
        return np.array(numbers, dtype=np.int32)[np.asarray(encoded.indices)]

    def sorted(self) -> tuple[list[str], Array]:
        """Returns the strings by name, and each number's place among them."""
        names = sorted(self._numbers)
        order = np.empty(len(names), dtype=np.int32)
        order[[self._numbers[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        return names, order


def _spool_rows(
    cache: Cache,
    live: LiveRows,
    positions: Rows,
    text_stream: str,
    spool: Spool,
    codes: tuple[_Dictionary, _Dictionary],
    by_clip: bool,
) -> tuple[Array, Array]:
    """Spools the samples' columns, and their captions in the order in which they stand in the index.

    Returns:
        (N,) how many captions each sample has, and the number of the first.
    """
    text_rows = live.texts[text_stream][positions]
    owners = np.argsort(text_rows, kind="stable")
    text_rows = text_rows[owners]
    with_texts = int(np.searchsorted(text_rows, 0))
    owners, text_rows = owners[with_texts:], text_rows[with_texts:]
    wanted = live.latent[positions], text_rows
    num_captions, first_caption = np.zeros(len(positions), np.int64), np.zeros(len(positions), np.int64)
    num_spooled = 0
    paths = list(dict.fromkeys([*index_paths(text_stream), *(CLIP_COLUMNS if by_clip else ())]))
    for table, ((_, base), (part, with_text)) in read_by_groups(cache.store, live, wanted, paths):
        if len(base):
            samples = _taken(table, base)
            _spool_samples(samples, spool, codes)
            if by_clip:
                spool.append("clip", clip_numbers(samples))
        if len(with_text):
            texts = _taken(table.select([text_stream]), with_text)[text_stream].combine_chunks()
            lengths = _spool_captions(cache, text_stream, texts, spool, codes)
            num_captions[owners[part]] = lengths
            first_caption[owners[part]] = num_spooled + lengths.cumsum() - lengths
            num_spooled += int(lengths.sum())
    return num_captions, first_caption


def _taken(table: pa.Table, rows: Rows) -> pa.Table:
    return table if len(rows) == table.num_rows else table.take(pa.array(rows))


def _spool_samples(table: pa.Table, spool: Spool, codes: tuple[_Dictionary, _Dictionary]) -> None:
    latent = table[LATENT_STREAM].combine_chunks()
    shapes = latent.field("shape")
    if pc.any(pc.not_equal(pc.list_value_length(shapes), 4)).as_py():
        raise InputError("latents that have not four dimensions in the index: run preprocess.verify")
    _spool_places("latent", latent, spool, codes)
    spool.append("shape", np.asarray(shapes.flatten()).astype(np.int32))
    sizes = [table[name].to_numpy().astype(np.int64) for name in ("num_frames", "height", "width")]
    spool.append("packed", pack_sizes(*sizes))
    spool.append("fps", table["fps"].to_numpy())
    spool.append("identity", sample_numbers(table["sample"]))


def _spool_captions(
    cache: Cache, text_stream: str, texts: pa.StructArray, spool: Spool, codes: tuple[_Dictionary, _Dictionary]
) -> Array:
    """Returns how many captions each row has."""
    lists = texts.field("captions")
    entries = lists.flatten()
    tokens = entries.field("num_tokens")
    _check_texts(cache, text_stream, texts.field("channels"), tokens)
    _spool_places("caption", entries, spool, codes)
    spool.append("num_tokens", np.asarray(tokens).astype(np.uint16))
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0)).astype(np.int64)


def _spool_places(name: str, places: pa.StructArray, spool: Spool, codes: tuple[_Dictionary, _Dictionary]) -> None:
    spool.append(f"{name}_shard", codes[0].encode(places.field("shard")))
    spool.append(f"{name}_offset", np.asarray(places.field("offset")).astype(np.int64))
    spool.append(f"{name}_num_bytes", np.asarray(places.field("bytes")).astype(np.int64))
    spool.append(f"{name}_crc32c", np.asarray(pc.fill_null(places.field("crc32c"), -1)).astype(np.int64))
    spool.append(f"{name}_codec", codes[1].encode(places.field("codec")))


def _check_texts(cache: Cache, text_stream: str, channels: pa.Array, tokens: pa.Array) -> None:
    provenance = cache.provenance[text_stream]
    found = pc.unique(channels).drop_null().to_pylist()
    if found not in ([provenance["text_channels"]], []):
        raise InputError(
            f"{cache.url}: caption embeddings of {found} channels, but text_channels="
            f"{provenance['text_channels']} in its provenance: run preprocess.verify"
        )
    if len(tokens) and (pc.min(tokens).as_py() < 1 or pc.max(tokens).as_py() > provenance["max_tokens"]):
        raise InputError(
            f"{cache.url}: expected captions of 1 to {provenance['max_tokens']} tokens: run preprocess.verify"
        )


def _require_texts(num_captions: Array, text_stream: str, spool: Spool) -> None:
    rows = np.flatnonzero(num_captions == 0)
    if len(rows):
        raise InputError(
            f"nothing for {counted(len(rows), 'sample')} in stream {text_stream!r}, sample "
            f"{_written(spool.take('identity').reshape(-1, 2)[rows[0]])} among them: run preprocess into the cache "
            "again to complete it"
        )


def _written(identity: Array) -> str:
    return f"{identity[0]:016x}{identity[1]:016x}"


def _save_in_order(
    folder: Path,
    spool: Spool,
    codes: tuple[_Dictionary, _Dictionary],
    num_captions: Array,
    first_caption: Array,
    by_clip: bool,
) -> BuiltIndex:
    """Writes what was spooled, a column at a time."""
    shards, shard_order = codes[0].sorted()
    codecs, codec_order = codes[1].sorted()
    shard, offset = shard_order[spool.take("latent_shard")], spool.take("latent_offset")
    packed = spool.take("packed")
    groups = None
    if by_clip:
        order, groups = order_by_variant(packed, spool.take("clip"), shard, offset)
    else:
        order = np.lexsort((offset, shard, packed))
    identity = spool.take("identity").reshape(-1, 2)[order]
    digest = hashlib.sha256()
    for name, column in (("identity", identity), ("latent_shard", shard[order]), ("latent_offset", offset[order])):
        digest.update(np.ascontiguousarray(column).data)
        save_column(folder, name, column)
    del column, shard, offset, identity
    save_column(folder, "latent_crc32c", spool.take("latent_crc32c")[order])
    save_column(folder, "latent_codec", codec_order[spool.take("latent_codec")][order].astype(np.uint8))

    num_captions, first_caption = num_captions[order], first_caption[order]
    caption_start = np.concatenate([[0], num_captions.cumsum()]).astype(np.int64)
    save_column(folder, "caption_start", caption_start)
    rows = np.arange(int(caption_start[-1])) + np.repeat(first_caption - caption_start[:-1], num_captions)
    del num_captions, first_caption
    save_column(folder, "caption_shard", shard_order[spool.take("caption_shard")][rows])
    save_column(folder, "caption_codec", codec_order[spool.take("caption_codec")][rows].astype(np.uint8))
    for name in ("caption_offset", "caption_crc32c", "num_tokens"):
        save_column(folder, name, spool.take(name)[rows])
    save_column(folder, "caption_num_bytes", spool.take("caption_num_bytes")[rows])
    del rows, caption_start
    save_column(folder, "latent_num_bytes", spool.take("latent_num_bytes")[order])

    shapes = spool.take("shape").reshape(len(order), -1)[order]
    identity = np.load(folder / "identity.npy", mmap_mode="r")
    packed = packed[order]
    fps = stated_rates(packed, spool.take("fps")[order])
    save_column(folder, "fps", fps)
    buckets = describe_buckets(packed, fps, shapes, identity, groups)
    return BuiltIndex(shards=shards, codecs=codecs, buckets=buckets, digest=digest.hexdigest())


def pack_sizes(num_frames: Array, height: Array, width: Array) -> Array:
    """Returns buckets (N,) as int64 that stand in the buckets' order."""
    packed: Array = ((num_frames << _SIZE_BITS) + height << _SIZE_BITS) + width
    return packed


def unpack_sizes(packed: Array) -> tuple[Array, Array, Array]:
    """Returns frames, height and width (N,) of what :func:`pack_sizes` packed."""
    mask = (1 << _SIZE_BITS) - 1
    return packed >> 2 * _SIZE_BITS, packed >> _SIZE_BITS & mask, packed & mask


def stated_rates(packed: Array, fps: Array) -> Array:
    """Returns the rates (N,) that batches tell, float32, of samples of buckets (see :func:`pack_sizes`)."""
    rates: Array = np.where(unpack_sizes(packed)[0] == 1, IMAGE_FPS, fps).astype(np.float32)
    return rates


def describe_buckets(
    packed: Array,
    fps: Array,
    shapes: Array,
    identity: Array,
    groups: dict[int, list[ClipGroup]] | None,
) -> list[dict[str, Any]]:
    """Returns what there is to know of each bucket, see :class:`BuiltIndex`.

    Args:
        packed: (N,) ascending, see :func:`pack_sizes`.
        fps: (N,).
        shapes: (N, 4) of the stored latents.
        identity: (N, 2).
        groups: Of each bucket, its clips by their number of variants; None where each sample is a clip.

    Raises:
        InputError: if a bucket's latents differ in shape.
    """
    firsts = np.flatnonzero(np.concatenate([[True], packed[1:] != packed[:-1]]))
    result = []
    for first, end in zip(firsts.tolist(), [*firsts[1:].tolist(), len(packed)], strict=True):
        size = int(packed[first])
        bucket = Bucket(*(int(part[0]) for part in unpack_sizes(packed[first : first + 1])))
        other = np.flatnonzero((shapes[first:end] != shapes[first]).any(axis=1))
        if len(other):
            row = first + int(other[0])
            raise InputError(
                f"sample {_written(identity[row])} of bucket {bucket} has a latent of shape "
                f"{tuple(shapes[row].tolist())}, others have {tuple(shapes[first].tolist())}: run preprocess.verify"
            )
        one_each = [ClipGroup(num_clips=end - first, num_variants=1)]
        result.append(
            {
                "bucket": str(bucket),
                "first_row": first,
                "groups": [asdict(group) for group in (groups or {}).get(size, one_each)],
                "fps": float(np.median(fps[first:end])),
                "latent_shape": shapes[first].tolist(),
            }
        )
    return result
