"""The attention facade."""

import pytest
import torch

from shared.errors import InputError
from train.model.attention import KeyMask, attention, preferred_backends


def plain_attention(q, k, v, mask):
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())


@pytest.mark.parametrize("backend", [None, "flash", "math"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_cpu_backend_computes_softmax_attention(backend, masked):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 5, 2, 12, generator=generator)
    k, v = (torch.randn(3, 7, 2, 12, generator=generator) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([[7], [1], [4]]) if masked else None
    out = attention(q, k, v, keys=None if mask is None else KeyMask(mask), backend=backend)
    torch.testing.assert_close(out.double(), plain_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cudnn", "flash-attn", "efficient"])
def test_a_backend_that_is_missing_here_is_an_error_and_is_not_replaced(backend):
    q = torch.randn(1, 2, 1, 8)
    with pytest.raises(InputError, match=f"{backend}.*not available on cpu in float32: use one of flash, math"):
        attention(q, q, q, backend=backend)


def test_half_precision_on_gpus_prefers_cudnn_and_float32_has_no_flash():
    assert preferred_backends("cuda", torch.bfloat16, masked=False)[0] == "cudnn"
    assert "flash" not in preferred_backends("cuda", torch.float32, masked=False)


def test_packed_keys_are_the_valid_ones_with_their_borders():
    keys = KeyMask(torch.tensor([[True, True, False], [True, False, False]]))
    assert keys.packed_positions.tolist() == [0, 1, 3]
    assert keys.borders.tolist() == [0, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", preferred_backends("cuda", torch.bfloat16, masked=True))
@pytest.mark.parametrize("masked", [False, True])
def test_every_gpu_backend_computes_softmax_attention_forwards_and_backwards(backend, masked):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 64, 2, 72), (3, 24, 2, 72), (3, 24, 2, 72)]
    tensors = [torch.randn(s, generator=generator).cuda().bfloat16().requires_grad_() for s in shapes]
    mask = torch.arange(24, device="cuda") < torch.tensor([[24], [1], [9]], device="cuda") if masked else None
    expected = plain_attention(*tensors, mask)
    expected_gradients = torch.autograd.grad(expected.square().sum(), tensors)
    out = attention(*tensors, keys=None if mask is None else KeyMask(mask), backend=backend)
    gradients = torch.autograd.grad(out.float().square().sum(), tensors)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert (found - wanted).norm() < 2e-2 * wanted.norm()
