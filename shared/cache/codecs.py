"""How a tensor becomes bytes, and back.

A payload is the tensor's values in row-major order and little-endian; its shape and its codec's name stand beside it,
in the index and in the sample's JSON. ``float32`` is exact, ``bfloat16`` keeps 8 significant bits, ``float16`` keeps
11 in the range of +-65504. The bytes of a payload are known before it is made: ``shared.spec.BYTES_PER_VALUE``.
"""

import math
from collections.abc import Sequence

import torch

from shared.errors import InputError
from shared.spec import BYTES_PER_VALUE

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
assert _DTYPES.keys() == BYTES_PER_VALUE.keys()


def _dtype(codec: str) -> torch.dtype:
    if codec not in _DTYPES:
        raise InputError(f"codec {codec!r} is not known: expected one of {', '.join(_DTYPES)}")
    return _DTYPES[codec]


def encode(values: torch.Tensor, codec: str) -> bytes:
    """Returns the payload of ``values`` (any shape, any float type).

    Raises:
        InputError: if the codec is not known, or a value is not finite or leaves the codec's range.
    """
    stored = values.detach().to(device="cpu", dtype=_dtype(codec)).contiguous()
    if not bool(torch.isfinite(stored).all()):
        worst = float(values.abs().max())
        raise InputError(f"codec {codec}: a value is not finite or out of range (largest magnitude {worst:g})")
    return stored.reshape(-1).view(torch.uint8).numpy().tobytes()


def decode(payload: bytes | bytearray, codec: str, shape: Sequence[int]) -> torch.Tensor:
    """Returns the tensor of ``shape`` that was encoded, in the codec's own type.

    Raises:
        InputError: if the codec is not known or the payload has another size than the shape asks for.
    """
    dtype = _dtype(codec)
    expected = math.prod(shape) * dtype.itemsize
    if len(payload) != expected:
        raise InputError(f"payload of {len(payload)} bytes: {codec} of shape {tuple(shape)} takes {expected}")
    if not expected:  # frombuffer takes no empty buffer
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(bytearray(payload), dtype=dtype).reshape(tuple(shape))
