"""Bits a value that entropy-coded payloads take, measured on real material.

How far zstd gets depends on the material, so --calibrate and --cache replace these by what they find. Codecs without
it have exact sizes (``shared.codec.raw_bytes``). Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from shared.codec import Codec
from shared.errors import InputError

Material = Literal["frames", "video", "still", "text"]
"""What is coded: latents of an image autoencoder frame by frame, latents of a video autoencoder, the latent of a single
frame, or embeddings of captions."""

_REAL_CLIPS = "docs/codecs.md: an 8x image autoencoder on three real clips; other autoencoders were not measured"
_FIRST_FRAMES = "docs/codecs.md: the same, first frames alone"
_WAN = "docs/codecs.md: a real Wan 2.1 latent; other video autoencoders were not measured"
_TEXT = "docs/codecs.md: texts with the statistics of T5-XXL's outputs"
_FLOAT32 = "its upper half as bfloat16, its lower half incompressible"

_DB_PER_BIT = 6.02
"""Halving the step costs one bit a value and gains this much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bits:
    """Bits a value of an entropy-coded payload."""

    per_value: float
    source: str
    sqnr_db: float | None = None
    """Signal to noise of what comes back, where it was measured on the user's own samples."""


_MEASURED: dict[tuple[Material, str], Bits] = {
    ("frames", "float32+zstd"): Bits(per_value=26.5, source=_FLOAT32),
    ("frames", "bfloat16+zstd"): Bits(per_value=10.50, source=_REAL_CLIPS),
    ("frames", "bfloat16+delta+zstd"): Bits(per_value=10.06, source=_REAL_CLIPS),
    ("frames", "float16+zstd"): Bits(per_value=13.6, source=_REAL_CLIPS),
    ("frames", "int8@37+zstd"): Bits(per_value=6.28, source=_REAL_CLIPS),
    ("frames", "int8@40+delta+zstd"): Bits(per_value=5.40, source=_REAL_CLIPS),
    ("frames", "int8@37+delta+zstd"): Bits(per_value=5.02, source=_REAL_CLIPS),
    ("video", "float32+zstd"): Bits(per_value=26.5, source=_FLOAT32),
    ("video", "bfloat16+zstd"): Bits(per_value=9.61, source=_WAN),
    ("video", "bfloat16+delta+zstd"): Bits(per_value=8.54, source=_WAN),
    ("video", "float16+zstd"): Bits(per_value=13.6, source=_REAL_CLIPS),
    ("video", "int8@37+zstd"): Bits(per_value=6.28, source=_WAN),
    ("video", "int8@40+delta+zstd"): Bits(per_value=3.89, source=_WAN),
    ("video", "int8@37+delta+zstd"): Bits(per_value=3.43, source=_WAN),
    ("still", "float32+zstd"): Bits(per_value=26.7, source=_FLOAT32),
    ("still", "bfloat16+zstd"): Bits(per_value=10.70, source=_FIRST_FRAMES),
    ("still", "bfloat16+delta+zstd"): Bits(per_value=10.70, source=_FIRST_FRAMES),
    ("still", "float16+zstd"): Bits(per_value=13.6, source=_REAL_CLIPS),
    ("still", "int8@37+zstd"): Bits(per_value=6.55, source=_FIRST_FRAMES),
    ("still", "int8@40+delta+zstd"): Bits(per_value=6.89, source=_FIRST_FRAMES),
    ("text", "float32+zstd"): Bits(per_value=27.0, source=_FLOAT32),
    ("text", "bfloat16+zstd"): Bits(per_value=10.99, source=_TEXT),
    ("text", "float16+zstd"): Bits(per_value=13.94, source=_TEXT),
    ("text", "int8@30+zstd"): Bits(per_value=5.34, source=_TEXT),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BitsTable:
    """The bits of every codec: those found on the user's own samples first, then those above."""

    found: Mapping[tuple[Literal["latent", "text"], str], Bits] = field(default_factory=dict)
    """By stream and codec."""

    def get(self, codec: Codec, material: Material) -> Bits:
        """Returns the bits a value of an entropy-coded codec.

        A quantised codec at other decibels than a measured one takes one bit more for every 6.02 dB.

        Raises:
            InputError: if there is none for that codec.
        """
        stream: Literal["latent", "text"] = "text" if material == "text" else "latent"
        if (own := self.found.get((stream, str(codec)))) is not None:
            return own
        if (bits := _MEASURED.get((material, str(codec)))) is not None:
            return bits
        for (kind, name), bits in _MEASURED.items():
            other = Codec.parse(name)
            if kind == material and other.values == codec.values == "int8" and other.delta == codec.delta:
                assert codec.sqnr_db is not None
                assert other.sqnr_db is not None
                more = (codec.sqnr_db - other.sqnr_db) / _DB_PER_BIT
                return Bits(per_value=max(bits.per_value + more, 0.5), source=f"{name}, a bit for each 6.02 dB")
        raise InputError(f"codec {codec}: its bits a value on {material} are not known: use --calibrate")
