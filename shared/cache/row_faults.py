"""What a row of the index says, against the provenance of its streams. Pure."""

import math
from collections.abc import Iterator
from dataclasses import replace

from shared.cache.dataset import Provenance
from shared.cache.expectation import row_streams
from shared.cache.layout import is_text
from shared.cache.rows import Row, payload_shape, places
from shared.cache.schema import REMOVED, SHARED
from shared.codec import Codec, stored_shape
from shared.errors import InputError
from shared.spec import Bucket, VaeGeometry, latent_shape


def row_faults(row: Row, provenance: Provenance) -> Iterator[str]:
    """Yields how a row contradicts its cache: streams, codecs, shapes.

    Args:
        row: As a fragment has it.
        provenance: Of the cache's streams; empty if it is not known.
    """
    key = row[SHARED]["id"] if SHARED in row else row["sample"]
    streams = row_streams(row)
    if not streams and row.get(REMOVED.name) is None:
        yield f"sample {key} has no stream"
    for stream in streams:
        about = provenance.get(stream)
        if provenance and about is None:
            yield f"stream {stream!r} is not in dataset.json or streams/: it has {', '.join(provenance)}"
            continue
        for place in places(row, stream):
            shape = payload_shape(row, stream, place)
            try:
                stored_shape(Codec.parse(place["codec"]), shape)
            except InputError as error:
                yield f"{stream} of sample {key}: {error}"
                continue
            if about is None:
                continue
            wanted = about.get("codec")
            if wanted is not None and place["codec"] != wanted:
                yield f"{stream} of sample {key}: codec {place['codec']}: its stream's is {wanted}"
            if is_text(stream):
                yield from _text_faults(stream, key, shape, about)
            else:
                yield from _latent_faults(row, key, shape, about)


def _text_faults(stream: str, key: str, shape: tuple[int, ...], about: dict[str, object]) -> Iterator[str]:
    most, channels = about.get("max_tokens"), about.get("text_channels")
    if channels is not None and shape[1] != channels:
        yield f"{stream} of sample {key}: {shape[1]} channels: its stream has {channels}"
    if isinstance(most, int) and not 1 <= shape[0] <= most:
        yield f"{stream} of sample {key}: {shape[0]} tokens: its stream has 1 to {most}"


def _latent_faults(row: Row, key: str, shape: tuple[int, ...], about: dict[str, object]) -> Iterator[str]:
    channels, stride = about.get("latent_channels"), about.get("spatial_stride")
    factor = 2 if about.get("posterior") == "mean+logvar" else 1
    if not isinstance(channels, int):
        return
    if not isinstance(stride, int):
        wanted = (channels * factor, *shape[1:])
    else:
        geometry = replace(VaeGeometry.recorded(about), latent_channels=channels * factor)
        try:
            wanted = latent_shape(Bucket(row["num_frames"], row["height"], row["width"]), geometry)
        except InputError as error:
            yield f"latent of sample {key}: {error}"
            return
    if shape != wanted:
        yield f"latent of sample {key}: shape {list(shape)}: bucket and VAE make {list(wanted)}"
    place = row["latent"]
    if not all(math.isfinite(value) for name in ("mean", "std") for value in place[name] or ()):
        yield f"latent of sample {key}: its mean or deviation is not finite"
