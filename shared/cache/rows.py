"""From encoded arrays to rows of the index, and from a row to the JSON beside its payloads.

A row is a dictionary with the columns of ``shared.cache.schema``. The dictionaries inside it that say where one payload
lies are its *places*; a place is filled in by whoever writes the payload.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shared.cache import layout, payload
from shared.cache.schema import MANIFEST, SHARED, WINDOW
from shared.cache.shard_file import StoredArray
from shared.codec import Codec
from shared.media.clip import TimeRange
from shared.spec import Bucket

Row = dict[str, Any]
Place = dict[str, Any]
"""``shard``, ``offset``, ``bytes``, ``crc32c`` and ``codec`` of one payload, and what else its stream keeps of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """One caption of a sample, embedded now or stored before."""

    id: str
    """See ``shared.cache.identity.text_id``."""
    caption: str
    """As the manifest gives it."""
    embedding: torch.Tensor | Place  # (L, D), or where it lies already


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One encoded clip in one bucket, and where it came from."""

    sample: str
    """Its identity, see ``shared.cache.identity.latent_id``."""
    source: str
    source_version: str
    bucket: Bucket
    frame_interval: int
    fps: float
    latent: torch.Tensor  # (C, T, H, W), or (2C, T, H, W) with the logarithm of the variance
    texts: Mapping[str, Sequence[Text]]
    """By stream: at least one caption each."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """The manifest's other columns."""
    time_range: TimeRange | None = None
    """The part of the source that the clip is, if it is not all of it."""
    sampling_fps: float | None = None
    """Frames a second, if they were taken by time."""
    window: int | None = None
    """Where the window starts, in frames or in steps of ``1 / sampling_fps`` seconds; None only for the middle of a
    whole clip whose frames were taken by number."""
    flip: bool = False
    """Whether it is mirrored left to right."""


def sample_row(
    sample: Sample, codecs: Mapping[str, Codec], generation: int
) -> tuple[Row, dict[str, list[StoredArray]]]:
    """Returns the row of a sample and the payloads to be written for it, by stream.

    Args:
        sample: What to store.
        codecs: By stream.
        generation: 0, or one more than that of what it replaces.

    Raises:
        InputError: if a codec cannot hold a value.
    """
    codec = codecs[layout.LATENT_STREAM]
    statistics = sample.latent.float()
    row: Row = {
        "sample": sample.sample,
        "source": sample.source,
        "source_version": sample.source_version,
        "num_frames": sample.bucket.num_frames,
        "height": sample.bucket.height,
        "width": sample.bucket.width,
        "frame_interval": sample.frame_interval,
        "fps": sample.fps,
        layout.LATENT_STREAM: {
            "generation": generation,
            "codec": str(codec),
            "shape": list(sample.latent.shape),
            "mean": statistics.mean((1, 2, 3)).tolist(),
            "std": statistics.std((1, 2, 3), correction=0).tolist(),
        },
    }
    part = {
        "start": sample.time_range and sample.time_range.start,
        "end": sample.time_range and sample.time_range.end,
        "sampling_fps": sample.sampling_fps,
        "window": sample.window,
        "flip": sample.flip or None,
    }
    row.update((name, value) for name, value in part.items() if value is not None)
    if sample.manifest:
        row[MANIFEST] = dict(sample.manifest)
    arrays = {layout.LATENT_STREAM: [_stored(sample.latent, codec)]}
    for stream, texts in sample.texts.items():
        row[stream], arrays[stream] = _text_struct(texts, codecs[stream], generation)
    return row, arrays


def text_row(
    sample: str, stream: str, texts: Sequence[Text], codec: Codec, generation: int
) -> tuple[Row, dict[str, list[StoredArray]]]:
    """Returns a row that gives a committed sample new texts in one stream, and the payloads to be written for it."""
    struct, arrays = _text_struct(texts, codec, generation)
    return {"sample": sample, stream: struct}, {stream: arrays}


def shared_text_row(stream: str, text: Text, codec: Codec) -> tuple[Row, dict[str, list[StoredArray]]]:
    """Returns a row of a text that samples share, and its payload."""
    struct, arrays = _text_struct([text], codec, 0)
    return {SHARED: struct["captions"][0], "channels": struct["channels"]}, {stream: arrays}


def _text_struct(texts: Sequence[Text], codec: Codec, generation: int) -> tuple[dict[str, Any], list[StoredArray]]:
    captions, arrays = [], []
    channels = 0
    for text in texts:
        entry = {"id": text.id, "caption": text.caption}
        if isinstance(text.embedding, torch.Tensor):
            stored = _stored(text.embedding, codec)
            arrays.append(stored)
            num_tokens, channels = stored.shape
            captions.append({**entry, "codec": str(codec), "num_tokens": num_tokens})
        else:
            captions.append({name: value for name, value in text.embedding.items() if name != "channels"} | entry)
            channels = text.embedding["channels"]
    return {"generation": generation, "channels": channels, "captions": captions}, arrays


def _stored(values: torch.Tensor, codec: Codec) -> StoredArray:
    return StoredArray(payload=payload.encode(values, codec), codec=codec, shape=tuple(values.shape))


def streams_of(row: Row) -> list[str]:
    """Returns the streams that a row brings, the latent first."""
    streams = (name for name, value in row.items() if isinstance(value, dict) and "generation" in value)
    return sorted(streams, key=lambda stream: (layout.is_text(stream), stream))


def places(row: Row, stream: str) -> list[Place]:
    """Returns the places of one stream's payloads in a row, in the order in which they are written."""
    if SHARED in row:
        return [row[SHARED]]
    return list(row[stream]["captions"]) if layout.is_text(stream) else [row[stream]]


def payload_shape(row: Row, stream: str, place: Place) -> tuple[int, ...]:
    """Returns the shape of the array that lies at one of a row's places: (C, T, H, W) or (L, D)."""
    if SHARED in row:
        return (place["num_tokens"], row["channels"])
    if layout.is_text(stream):
        return (place["num_tokens"], row[stream]["channels"])
    return tuple(place["shape"])


def describe(row: Row, arrays: Mapping[str, Sequence[StoredArray]]) -> bytes:
    """Returns the JSON beside a row's payloads. A stream whose payloads lie elsewhere is described by its ids."""
    about: dict[str, Any] = {
        name: row[name] for name in ("source", "num_frames", "height", "width", "fps") if name in row
    }
    about.update((name, row[name]) for name in WINDOW.names if row.get(name) is not None)
    if row.get(MANIFEST):
        about[MANIFEST] = row[MANIFEST]
    streams: dict[str, dict[str, Any]] = {}
    if SHARED in row:
        ((stream, stored),) = arrays.items()
        text = row[SHARED]
        streams[stream] = layout.text_json(
            text["codec"], row["channels"], [text["caption"]], [text["num_tokens"]], [len(stored[0].payload)]
        )
    for stream in streams_of(row):
        value, stored = row[stream], arrays.get(stream, ())
        if not layout.is_text(stream):
            streams[stream] = layout.latent_json(value["codec"], value["shape"])
        elif stored and len(stored) == len(value["captions"]):
            streams[stream] = layout.text_json(
                value["captions"][0]["codec"],
                value["channels"],
                [caption["caption"] for caption in value["captions"]],
                [caption["num_tokens"] for caption in value["captions"]],
                [len(array.payload) for array in stored],
            )
        else:
            streams[stream] = {
                "captions": [caption["caption"] for caption in value["captions"]],
                "ids": [caption["id"] for caption in value["captions"]],
            }
    return layout.sample_json(about, streams)
