"""Tensors as bytes."""

import math

import numpy as np
import pytest
import torch

from shared.cache import codecs
from shared.errors import InputError
from shared.spec import BYTES_PER_VALUE


@pytest.mark.parametrize("codec", list(BYTES_PER_VALUE))
@pytest.mark.parametrize("shape", [(8, 4, 6, 10), (1,), (0, 32), ()])
def test_a_tensor_comes_back_rounded_to_its_codec_and_no_further(codec: str, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    payload = codecs.encode(values, codec)
    assert len(payload) == math.prod(shape) * BYTES_PER_VALUE[codec]
    decoded = codecs.decode(payload, codec, shape)
    assert decoded.dtype == getattr(torch, codec)
    assert torch.equal(decoded, values.to(decoded.dtype))


def test_bytes_are_little_endian_and_row_major() -> None:
    values = torch.tensor([[1.0, -2.0], [0.5, 3.0]]).T
    payload = codecs.encode(values, "float32")
    assert np.frombuffer(payload, "<f4").tolist() == [1.0, 0.5, -2.0, 3.0]


@pytest.mark.parametrize(("codec", "value"), [("float32", math.nan), ("bfloat16", math.inf), ("float16", 70_000.0)])
def test_what_a_codec_cannot_hold_is_refused(codec: str, value: float) -> None:
    with pytest.raises(InputError, match="not finite or out of range"):
        codecs.encode(torch.tensor([1.0, value]), codec)


def test_a_payload_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"payload of 6 bytes: bfloat16 of shape \(2, 2\) takes 8"):
        codecs.decode(bytes(6), "bfloat16", (2, 2))


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'int3'.*expected one of float32, bfloat16, float16"):
        codecs.encode(torch.zeros(1), "int3")
