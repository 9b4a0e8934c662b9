"""Codecs by name: how an array of floats is stored, and the bytes and shape that this takes.

Pure: no torch, no numpy, so that estimates start in a moment. ``shared.cache.payload`` does the work, and
``docs/codecs.md`` defines the bytes. Letters: C latent channels, T latent frames, H and W latent rows and columns,
L caption tokens, D text channels.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from shared.errors import InputError

Values = Literal["float32", "bfloat16", "float16", "int8"]
"""What one value is stored as."""

_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_FORM = "VALUES[@DB][+delta][+zstd], e.g. bfloat16, bfloat16+zstd, int8@40+delta+zstd"
_CODEC = re.compile(r"([a-z]+[0-9]+)(@[0-9]+(?:\.[0-9]{1,2})?)?(\+delta)?(\+zstd)?")
_MIN_SQNR_DB, _MAX_SQNR_DB = 10.0, 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """How the arrays of one stream are stored."""

    values: Values
    """The type of a stored value. Floats are stored as they are; ``int8`` is quantised with a step per channel."""
    sqnr_db: float | None = None
    """With ``int8`` only: the aimed signal to quantisation noise ratio of each channel, in dB, from 10 to 60."""
    delta: bool = False
    """Store differences from the values before (in time; int8 also in a row). For latents only, and before zstd."""
    zstd: bool = False
    """Compress with Zstandard."""

    def __post_init__(self) -> None:
        if self.values not in get_args(Values):
            raise InputError(f"codec {self.values!r} is not known: expected one of {', '.join(get_args(Values))}")
        if self.values == "int8":
            if self.sqnr_db is None:
                raise InputError(
                    "codec int8 does not say how fine its steps are: write the aimed signal to noise ratio "
                    "in dB, e.g. int8@38 for latents, int8@30 for text"
                )
            if not _MIN_SQNR_DB <= self.sqnr_db <= _MAX_SQNR_DB or self.sqnr_db != round(self.sqnr_db, 2):
                raise InputError(
                    f"codec int8@{self.sqnr_db}: expected {_MIN_SQNR_DB:g} to {_MAX_SQNR_DB:g} dB after the @, "
                    f"with at most two decimals"
                )
        elif self.sqnr_db is not None:
            raise InputError(f"codec {self.values}@{self.sqnr_db:g}: only int8 takes @DB, write {self.values}")
        if self.delta and not self.zstd:
            raise InputError(f"codec {self}: differences alone save nothing, write {self}+zstd or leave +delta out")

    def __str__(self) -> str:
        aim = "" if self.sqnr_db is None else f"@{self.sqnr_db:g}"
        return f"{self.values}{aim}{'+delta' * self.delta}{'+zstd' * self.zstd}"

    @classmethod
    def parse(cls, text: str) -> "Codec":
        """Returns the codec that is written as ``VALUES[@DB][+delta][+zstd]``.

        Raises:
            InputError: if the text has another form, or says what its values do not take.
        """
        match = _CODEC.fullmatch(text)
        if match is None:
            raise InputError(f"codec {text!r}: expected {_FORM}")
        values, aim, delta, zstd = match.groups()
        if values not in get_args(Values):
            raise InputError(f"codec {text!r}: expected {_FORM}, with {', '.join(get_args(Values))} for VALUES")
        return cls(
            values=cast(Values, values), sqnr_db=float(aim[1:]) if aim else None, delta=bool(delta), zstd=bool(zstd)
        )


def stored_shape(codec: Codec, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the array that a payload holds before zstd.

    Args:
        codec: How the array is stored.
        shape: Of the array that is encoded: (C, T, H, W) for a latent, (L, D) for a caption's embedding.

    Raises:
        InputError: if the shape is neither, or the codec takes differences in time of what has no frames.
    """
    if len(shape) not in (2, 4) or min(shape) < 0:
        raise InputError(f"codec {codec}: shape {tuple(shape)}, expected (C, T, H, W) or (L, D)")
    if codec.delta and len(shape) == 2:
        raise InputError(f"codec {codec}: a text of shape {tuple(shape)} has no frames, write the codec without +delta")
    if codec.values == "int8":
        if len(shape) == 4:
            return (shape[0], (2 if codec.delta else 1) + math.prod(shape[1:]))
        return (1 + shape[0], shape[1])
    return (_BYTES[codec.values], *shape) if codec.zstd else tuple(shape)


def stored_dtype(codec: Codec) -> str:
    """Returns numpy's name of the type that a payload holds before zstd; bfloat16 without zstd are uint16 bits."""
    if codec.values == "int8":
        return "int8"
    if codec.zstd:
        return "uint8"
    return "uint16" if codec.values == "bfloat16" else codec.values


def raw_bytes(codec: Codec, shape: Sequence[int]) -> int:
    """Returns the bytes of a payload of ``shape`` before zstd: exact for codecs without zstd.

    Raises:
        InputError: as ``stored_shape`` does.
    """
    values = math.prod(stored_shape(codec, shape))
    return values if codec.zstd else values * _BYTES[codec.values]
