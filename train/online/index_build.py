"""From a manifest and its probes to the columns of an index: the samples, and their order, of the cache that
``preprocess`` would make of them.

A cache's samples lie by shard, and shards are named by what they hold; so a plan tells the order without encoding.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache.committed import Removed
from shared.cache.dataset import Provenance
from shared.cache.identity import identity_texts
from shared.cache.layout import LATENT_STREAM
from shared.cache.schema import MANIFEST
from shared.clips.plan import Plan, ShardRows, make_plan
from shared.clips.plan_options import plan_options
from shared.clips.samples import SampleMaker, TakenRows, facts_of
from shared.errors import InputError
from shared.fingerprints import Lookup
from shared.media.manifest import Manifest
from shared.spec import VaeGeometry, latent_shape
from train.chosen_rows import Selection
from train.clip_order import clip_numbers, order_by_variant
from train.index_build import describe_buckets, pack_sizes, stated_rates, unpack_sizes
from train.index_columns import Array, keeping, save_column
from train.online.encoding import OnlineEncoding
from train.where import Where, held_out, parse_fraction

if TYPE_CHECKING:  # Loads transformers, which a run from a cache does without.
    from shared.encoders.t5 import TextEncoder

CLIPS_FILE = "clips.arrow"
REFUSED_FILE = "refused.jsonl"
_CLIP = ("source", "url", "offset", "size", "start", "end")
_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True)
class _Samples:
    """Planned samples (N,), in the plan's order."""

    packed: Array
    """Their buckets, see ``pack_sizes``."""
    shard: Array
    """Their shards, by name."""
    offset: Array
    """Their places in these."""
    identity: Array
    """(N, 2)."""
    row: Array
    """Of the manifest."""
    start: Array
    """Where their windows start."""
    flip: Array
    is_centre: Array
    """Whether the window is the one in the middle."""

    def take(self, rows: Array) -> "_Samples":
        return _Samples(**{name: getattr(self, name)[rows] for name in self.__slots__})

    @classmethod
    def of(cls, plan: Plan) -> "_Samples":
        shards = [plan.tasks.rows(place) for place in range(len(plan.tasks))]
        by_name = np.argsort(np.array([shard.shard_id for shard in shards], "S32"))
        number = np.empty(len(shards), np.int64)
        number[by_name] = np.arange(len(shards))
        lengths = [len(shard.clips) for shard in shards]

        def each(values: Sequence[Any]) -> Array:
            return np.repeat(np.array(values), lengths)

        def joined(name: str, empty: Array) -> Array:
            return np.concatenate([empty, *(getattr(shard, name) for shard in shards)])

        sizes = [each([_size(shard)[part] for shard in shards]).astype(np.int64) for part in range(3)]
        return cls(
            packed=pack_sizes(sizes[0], sizes[1], sizes[2]),
            shard=each(number.tolist()).astype(np.int64),
            offset=np.concatenate([np.empty(0, np.int64), *map(np.arange, lengths)]),
            identity=joined("numbers", np.empty((0, 2), np.uint64)),
            row=joined("clips", np.empty(0, np.int64)),
            start=joined("starts", np.empty(0, np.int32)),
            flip=each([shard.variant.flip for shard in shards]).astype(bool),
            is_centre=each([shard.variant.number == 0 for shard in shards]).astype(bool),
        )


def _size(shard: ShardRows) -> tuple[int, int, int]:
    return shard.bucket.num_frames, shard.bucket.height, shard.bucket.width


def build_online_columns(
    folder: Path,
    manifest: Manifest,
    probes: pa.Table,
    encoding: OnlineEncoding,
    provenance: Provenance,
    text: "TextEncoder",
    selection: Selection,
    *,
    by_clip: bool,
) -> dict[str, Any]:
    """Writes the columns of a manifest's samples (see ``OnlineColumns``) into a folder, and returns their description.

    Args:
        folder: Is there.
        manifest: The clips.
        probes: Of them, see ``shared.clips.probes.Probes.table_for``.
        encoding: The options.
        provenance: Of the encoders.
        text: Cleans and tokenises captions.
        selection: Which samples are taken.
        by_clip: Put the variants of each clip where ``train.variants`` finds them; else each sample is a clip.

    Raises:
        InputError: if no sample is left, or a sample does not suit the autoencoder.
    """
    nothing = Lookup(np.empty((0, 2), np.uint64))
    plan = make_plan(
        manifest,
        probes,
        plan_options(encoding, provenance),
        committed=nothing,
        removed=Removed.of({}),
        refused=nothing,
    )
    samples = _Samples.of(plan)
    used = np.unique(samples.row)
    texts = _save_texts(folder, manifest, used, text)
    refused = _write_refusals(folder, manifest, plan, texts.lost)
    samples = samples.take(np.flatnonzero(texts.num_captions[samples.row] > 0))
    if not len(samples.row):
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
        raise InputError(f"manifest {encoding.manifest}: no clip can be used ({why}): see --buckets")
    rates = np.zeros(manifest.table.num_rows)
    maker = SampleMaker(manifest, probes, encoding.sampling)
    rates[used] = maker.rates(used)
    about = _index_rows(samples, manifest, maker, rates, encoding)
    samples, about = _selected(samples, about, selection, encoding)
    groups = None
    if by_clip:
        order, groups = order_by_variant(samples.packed, clip_numbers(about), samples.shard, samples.offset)
    else:
        order = np.lexsort((samples.offset, samples.shard, samples.packed))
    samples = samples.take(order)
    _save_samples(folder, samples, texts, maker)
    fps = stated_rates(samples.packed, rates[samples.row])
    save_column(folder, "fps", fps)
    digest = hashlib.sha256(np.ascontiguousarray(samples.identity).data).hexdigest()
    shapes = _stored_shapes(samples.packed, encoding, provenance)
    return {
        "buckets": describe_buckets(samples.packed, fps, shapes, samples.identity, groups),
        "digest": digest,
        "refused": refused,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Texts:
    """The captions of clips, by the manifest's rows (M,)."""

    num_captions: Array
    """Of which cleaning leaves something."""
    first: Array
    """The number of the first of them among all captions."""
    num_tokens: Array
    """Of each caption."""
    lost: list[int]
    """Rows of whose captions nothing is left."""


def _save_texts(folder: Path, manifest: Manifest, used: Array, text: "TextEncoder") -> _Texts:
    """Writes the token ids of the captions of some rows, one caption behind another."""
    num_captions = np.zeros(manifest.table.num_rows, np.int64)
    first = np.zeros(manifest.table.num_rows, np.int64)
    lengths: list[Array] = [np.empty(0, np.int64)]
    lost: list[int] = []
    num_before = 0
    captions = TakenRows(manifest.table)
    parts: list[Array] = [np.empty(0, np.int32)]
    for start in range(0, len(used), _ROWS_AT_ONCE):
        rows = used[start : start + _ROWS_AT_ONCE]
        cleaned = [
            list(dict.fromkeys(filter(None, map(text.clean, own))))
            for own in captions.take(rows, ["captions"])["captions"].to_pylist()
        ]
        counts = np.array([len(own) for own in cleaned], np.int64)
        num_captions[rows], first[rows] = counts, num_before + counts.cumsum() - counts
        num_before += int(counts.sum())
        lost += rows[counts == 0].tolist()
        if num_before:
            tokens = text.tokenize(list(chain.from_iterable(cleaned))) if counts.any() else []
            lengths.append(np.array([len(ids) for ids in tokens], np.int64))
            parts.append(np.fromiter(chain.from_iterable(tokens), np.int32))
    num_tokens = np.concatenate(lengths)
    save_column(folder, "token_ids", np.concatenate(parts))
    save_column(folder, "token_start", np.concatenate([[0], num_tokens.cumsum()]).astype(np.int64))
    return _Texts(num_captions=num_captions, first=first, num_tokens=num_tokens, lost=lost)


def _save_samples(folder: Path, samples: _Samples, texts: _Texts, maker: SampleMaker) -> None:
    """Writes the samples' columns, and what decoding needs of their clips."""
    save_column(folder, "identity", samples.identity)
    counts = texts.num_captions[samples.row]
    starts = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    save_column(folder, "caption_start", starts)
    numbers = np.arange(int(starts[-1])) + np.repeat(texts.first[samples.row] - starts[:-1], counts)
    save_column(folder, "caption_text", numbers)
    save_column(folder, "num_tokens", texts.num_tokens[numbers].astype(np.uint16))
    save_column(folder, "start", samples.start)
    save_column(folder, "flip", samples.flip)
    save_column(folder, "is_centre", samples.is_centre)
    used, clip = np.unique(samples.row, return_inverse=True)
    save_column(folder, "clip", clip.astype(np.int64))
    facts = TakenRows(maker.probes)
    places: list[Array] = []
    rows = TakenRows(maker.manifest.table)
    schema = pa.schema([*(maker.manifest.table.schema.field(name) for name in _CLIP), ("version", pa.string())])
    clips_file = str(folder / CLIPS_FILE)
    with keeping(folder), pa.OSFile(clips_file, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, len(used), _ROWS_AT_ONCE):
            some = used[start : start + _ROWS_AT_ONCE]
            known = facts.take(some)
            places.append(facts_of(known).num_places(maker.sampling))
            part = rows.take(some, _CLIP).append_column("version", known["version"])
            writer.write_table(part.cast(schema).combine_chunks())
    save_column(folder, "num_places", np.concatenate(places)[clip])


def _index_rows(
    samples: _Samples, manifest: Manifest, maker: SampleMaker, rates: Array, encoding: OnlineEncoding
) -> pa.Table:
    """Returns the samples as rows of a cache's index, as far as conditions and the order of variants need them."""
    rows = pa.array(samples.row)
    used, place = np.unique(samples.row, return_inverse=True)
    versions = TakenRows(maker.probes).take(used, ["version"])["version"].take(pa.array(place))
    whole = pc.and_(manifest.table["start"].is_null(), manifest.table["end"].is_null()).take(rows)
    sampling = encoding.sampling
    is_plain = pc.and_(whole, pa.array(samples.is_centre & ~samples.flip & (sampling.fps is None)))
    starts = pc.if_else(whole, None, pc.fill_null(manifest.table["start"].take(rows), 0.0))
    num_frames, height, width = unpack_sizes(samples.packed)
    columns = {
        "sample": pa.array(identity_texts(samples.identity)),
        "source": manifest.table["source"].take(rows),
        "source_version": versions,
        "num_frames": pa.array(num_frames.astype(np.int32)),
        "height": pa.array(height.astype(np.int32)),
        "width": pa.array(width.astype(np.int32)),
        "frame_interval": pa.array(np.full(len(rows), sampling.interval, np.int32)),
        "fps": pa.array(rates[samples.row]),
        "start": starts,
        "end": manifest.table["end"].take(rows),
        "sampling_fps": pa.array([sampling.fps] * len(rows), pa.float64()),
        "window": pc.if_else(is_plain, None, pa.array(samples.start)),
        "flip": pc.if_else(is_plain, None, pa.array(samples.flip)),
    }
    table = pa.table(columns)
    if "columns" in manifest.table.column_names:
        table = table.append_column(MANIFEST, manifest.table["columns"].take(rows))
    return table


def _selected(
    samples: _Samples, about: pa.Table, selection: Selection, encoding: OnlineEncoding
) -> tuple[_Samples, pa.Table]:
    """Returns what a selection takes of the samples; at least one."""
    taken = np.ones(len(samples.row), bool)
    if selection.where is not None:
        own = about.schema.field(MANIFEST).type if MANIFEST in about.column_names else ()
        names = [*about.column_names, *(field.name for field in own)]
        taken &= Where(selection.where).select(about, lambda: names).to_numpy(zero_copy_only=False)
        if not taken.any():
            raise InputError(f"{encoding.manifest}: no sample fulfils --where {selection.where!r}: ask for less")
    if selection.holdout is not None:
        taken &= held_out(about["source"], parse_fraction(selection.holdout)) == selection.held_out_side
        if not taken.any():
            side = "held out" if selection.held_out_side else "left to train on"
            raise InputError(
                f"{encoding.manifest}: --holdout {selection.holdout}: no sample is {side}: take another part"
            )
    if taken.all():
        return samples, about
    rows = np.flatnonzero(taken)
    return samples.take(rows), about.take(pa.array(rows))


def _stored_shapes(packed: Array, encoding: OnlineEncoding, provenance: Provenance) -> Array:
    geometry = VaeGeometry.recorded(provenance[LATENT_STREAM])
    factor = 2 if encoding.posterior == "mean+logvar" else 1
    shapes = np.zeros((len(packed), 4), np.int32)
    for bucket in encoding.parsed_buckets():
        sizes = [np.array([size]) for size in (bucket.num_frames, bucket.height, bucket.width)]
        channels, *rest = latent_shape(bucket, geometry)
        shapes[packed == pack_sizes(*sizes)[0]] = (channels * factor, *rest)
    return shapes


def _write_refusals(folder: Path, manifest: Manifest, plan: Plan, lost: Sequence[int]) -> dict[str, int]:
    """Writes why clips and rows of the manifest are not used, a line each, and returns how many for which reason."""
    counts: dict[str, int] = {}

    def rows() -> Iterator[dict[str, Any]]:
        for row in manifest.refused:
            yield {"source": row.source, "reason": row.reason, "detail": row.detail}
        for refusal in plan.refusals:
            yield asdict(refusal)
        for number in lost:
            clip = manifest.clips[number]
            detail = f"cleaning leaves nothing of {clip.captions[0]!r}: mend the caption or use --cleaning none"
            yield {"source": clip.source, "reason": "no_caption_left", "detail": detail}

    with keeping(folder), open(folder / REFUSED_FILE, "w", encoding="utf-8") as file:
        for row in rows():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[row["reason"]] = counts.get(row["reason"], 0) + 1
    return counts
