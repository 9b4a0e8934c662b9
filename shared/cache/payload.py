"""Payloads: the stored bytes of one array, one latent or one caption's embedding. ``docs/codecs.md`` defines them.

A payload is a stored array, whose shape and type follow from the codec, as it is or in one Zstandard frame. Values that
look alike are brought together before that, and zstd's blocks end between channels, so that its tables of frequencies
fit: it finds no repetitions in such data, only frequencies.

Letters: C latent channels, T latent frames, H and W latent rows and columns, L caption tokens, D text channels,
P bytes of one value.
"""

import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard

from shared.cache.quantised import dequantise_into, quantise
from shared.codec import Codec, raw_bytes, stored_dtype, stored_shape
from shared.errors import InputError

Payload = bytes | bytearray | memoryview
Array = npt.NDArray[Any]

_FLOATS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MIN_BLOCK_BYTES = 16 * 1024
_CACHED_BYTES = 256 * 1024
_END_OF_BLOCK = zstandard.COMPRESSOBJ_FLUSH_BLOCK
_threads = threading.local()


def decoded_dtype(codec: Codec) -> torch.dtype:
    """Returns the type that a payload decodes to: the codec's own float type, bfloat16 for int8."""
    return _FLOATS.get(codec.values, torch.bfloat16)


def encode(values: torch.Tensor, codec: Codec) -> bytes:
    """Returns the payload of ``values``, (C, T, H, W) or (L, D) of any float type. Equal input gives equal bytes.

    Raises:
        InputError: if a value is not finite or out of the codec's range, or the codec does not suit the shape.
    """
    shape = stored_shape(codec, values.shape)
    rounded = values.detach().to("cpu", _FLOATS.get(codec.values, torch.float32)).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        worst = float(values.abs().max())
        raise InputError(f"codec {codec}: a value is not finite or out of range (largest magnitude {worst:g})")
    if codec.values == "int8":
        stored: Array = quantise(rounded.numpy(), codec)
    elif codec.zstd:
        stored = _byte_planes(_bits(rounded), codec)
    else:
        stored = _bits(rounded)
    assert stored.shape == shape, (stored.shape, shape)
    return _compressed(stored, values.ndim) if codec.zstd else stored.tobytes()


def decode(payload: Payload, codec: Codec, shape: Sequence[int], *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns the array of ``shape`` that was encoded.

    Args:
        payload: What ``encode`` returned.
        codec: That it was encoded with.
        shape: Of the array that was encoded, (C, T, H, W) or (L, D).
        dtype: Of the result; None: ``decoded_dtype(codec)``.

    Raises:
        InputError: if the payload is not one of this codec and shape. No more memory is taken than the shape asks for.
    """
    stored = stored_array(payload, codec, shape)
    out = torch.empty(tuple(shape), dtype=decoded_dtype(codec))
    _decode_stored(stored, codec, out)
    return out if dtype is None else out.to(dtype)


def decode_into(payload: Payload, codec: Codec, out: torch.Tensor) -> None:
    """Writes the array that was encoded into ``out``, e.g. a sample's place in a batch.

    Args:
        payload: What ``encode`` returned.
        codec: That it was encoded with.
        out: Contiguous, on the CPU, of the encoded array's shape and of type ``decoded_dtype(codec)``.

    Raises:
        InputError: if the payload is not one of this codec and shape; ``out`` is then as it was or partly written.
    """
    assert (out.is_contiguous(), out.dtype) == (True, decoded_dtype(codec)), (out.stride(), out.dtype)
    _decode_stored(stored_array(payload, codec, out.shape), codec, out)


def stored_array(payload: Payload, codec: Codec, shape: Sequence[int]) -> Array:
    """Returns what a payload holds before zstd, as ``shared.codec.stored_shape`` and ``stored_dtype`` say; read-only.

    Args:
        payload: What ``encode`` returned.
        codec: That it was encoded with.
        shape: Of the array that was encoded, (C, T, H, W) or (L, D).

    Raises:
        InputError: if the payload is not one of this codec and shape.
    """
    expected = raw_bytes(codec, shape)
    raw = _decompressed(payload, codec, shape, expected) if codec.zstd else payload
    if len(raw) != expected:
        raise InputError(f"payload of {len(raw)} bytes: {codec} of shape {tuple(shape)} takes {expected}")
    stored = np.frombuffer(raw, np.dtype(stored_dtype(codec)).newbyteorder("<")).reshape(stored_shape(codec, shape))
    stored.flags.writeable = False
    return stored


def _decode_stored(stored: Array, codec: Codec, out: torch.Tensor) -> None:
    if not out.numel():
        return
    if codec.values == "int8":
        dequantise_into(stored, codec, out)
    elif codec.zstd:
        _join_byte_planes(stored, codec, _bits(out))
    else:
        _bits(out)[...] = stored.view(_bits(out).dtype)


def _bits(values: torch.Tensor) -> Array:
    """Returns the bits of floats as unsigned integers that share their memory."""
    width = values.element_size()
    return values.view(torch.int16 if width == 2 else torch.int32).numpy().view(f"u{width}")


def _byte_planes(bits: Array, codec: Codec) -> Array:
    """Returns uint8 (P, ...), least significant bytes first: the exponent, which compresses, stands in the last.

    Floats read as integers, negative ones with all bits but the sign inverted, are in order. Of these, or of their
    differences from the frame before, the sign goes to the lowest bit (zigzag: 0, -1, 1, -2, ...).
    """
    width = bits.itemsize
    top = 8 * width - 1
    if codec.delta:
        ordered = bits.view(f"i{width}")
        ordered = np.where(ordered < 0, ordered ^ (2**top - 1), ordered)
        ordered[:, 1:] -= ordered[:, :-1].copy()
        zigzag = ((ordered << 1) ^ (ordered >> top)).view(bits.dtype)
    else:
        zigzag = (bits << 1) | (bits >> top)  # the same, in short
    return np.stack([(zigzag >> (8 * plane)).astype(np.uint8) for plane in range(width)])


def _join_byte_planes(planes: Array, codec: Codec, out: Array) -> None:
    """Undoes ``_byte_planes``, some channels or tokens at a time: few enough to stay in the CPU's cache."""
    width = out.itemsize
    top = 8 * width - 1
    rows = max(1, _CACHED_BYTES // (out[0].nbytes or 1))
    for start in range(0, len(out), rows):
        bits = out[start : start + rows]
        np.copyto(bits, planes[-1, start : start + rows])
        for plane in planes[-2::-1]:
            np.left_shift(bits, 8, out=bits)
            np.bitwise_or(bits, plane[start : start + rows], out=bits)
        if not codec.delta:
            sign = bits << top
            np.right_shift(bits, 1, out=bits)
            np.bitwise_or(bits, sign, out=bits)
            continue
        ordered = bits.view(f"i{width}")
        negative = -(ordered & 1)
        np.right_shift(bits, 1, out=bits)
        ordered ^= negative
        for frame in range(1, ordered.shape[1]):
            ordered[:, frame] += ordered[:, frame - 1]
        np.right_shift(ordered, top, out=negative)
        negative &= 2**top - 1
        ordered ^= negative


def _blocks(stored: Array, ndim: int) -> Iterator[bytes]:
    """Yields the stored bytes, cut where zstd's blocks end.

    That is after each byte plane, after a text's row of steps, and between the channels of a latent, several together
    where they are small, since each block brings a table of frequencies.
    """
    for part in stored if stored.ndim > ndim else [stored]:
        if ndim == 2:
            cuts = [0, 1, len(part)] if part.dtype == np.int8 else [0, len(part)]
        else:
            cuts = [*range(0, len(part), -(-_MIN_BLOCK_BYTES // (part[0].nbytes or 1)) if len(part) else 1), len(part)]
        for start, end in itertools.pairwise(cuts):
            yield part[start:end].tobytes()


def _compressed(stored: Array, ndim: int) -> bytes:
    """Returns the shorter of two frames: with hardly a search for repetitions, or with zstd's quickest."""
    blocks = list(_blocks(stored, ndim))
    frames = []
    for search in ({"strategy": zstandard.STRATEGY_FAST, "min_match": 7, "hash_log": 6}, {}):
        parameters = zstandard.ZstdCompressionParameters.from_level(
            1, source_size=stored.nbytes, write_content_size=True, **search
        )
        writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=stored.nbytes)
        parts = [part for block in blocks for part in (writer.compress(block), writer.flush(_END_OF_BLOCK))]
        frames.append(b"".join([*parts, writer.flush()]))
    return min(frames, key=len)


def _decompressed(payload: Payload, codec: Codec, shape: Sequence[int], expected: int) -> bytes:
    if not hasattr(_threads, "decompressor"):
        _threads.decompressor = zstandard.ZstdDecompressor()  # not to be shared by threads, slow to make
    try:
        found = zstandard.frame_content_size(payload)
        if found != expected:
            raise InputError(f"payload says it holds {found} bytes: {codec} of shape {tuple(shape)} takes {expected}")
        decompressed: bytes = _threads.decompressor.decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise InputError(f"payload is not one whole zstd frame: {error}") from error
    return decompressed
