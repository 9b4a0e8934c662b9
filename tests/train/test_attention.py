"""The attention facade."""

import pytest
import torch

from shared.errors import InputError
from train.model.attention import KeyMask, _varlen, attention, caption_attention, preferred_backends


def plain_attention(q, k, v, mask):
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())


def attend(q, k, v, mask, backend):
    if mask is None:
        return attention(q, k, v, backend=backend)
    return caption_attention(q, torch.stack([k, v], dim=2), KeyMask.valid_first(mask)[0], backend=backend)


@pytest.mark.parametrize("backend", [None, "flash", "math"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_cpu_backend_computes_softmax_attention(backend, masked):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 5, 2, 12, generator=generator)
    k, v = (torch.randn(3, 7, 2, 12, generator=generator) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([[7], [1], [4]]) if masked else None
    out = attend(q, k, v, mask, backend)
    torch.testing.assert_close(out.double(), plain_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cudnn", "flash-attn", "efficient"])
def test_a_backend_that_is_missing_here_is_an_error_and_is_not_replaced(backend):
    q = torch.randn(1, 2, 1, 8)
    with pytest.raises(InputError, match=f"{backend}.*not available on cpu in float32: use one of flash, math"):
        attention(q, q, q, backend=backend)


def test_half_precision_on_gpus_prefers_cudnn_and_float32_has_no_flash():
    assert preferred_backends("cuda", torch.bfloat16, masked=False)[0] == "cudnn"
    assert "flash" not in preferred_backends("cuda", torch.float32, masked=False)


def test_keys_that_are_seen_come_first_and_the_others_lie_between_their_borders():
    keys, order = KeyMask.valid_first(torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]]))
    assert order.tolist() == [[0, 2, 1], [1, 0, 2], [0, 1, 2]]
    assert keys.mask.int().tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert keys.borders.tolist() == [0, 2, 3, 4, 6, 6, 9]
    assert keys.borders.dtype is torch.int32


def plain_varlen(q, k, v, query_borders, key_borders, _longest_q, _longest_k):
    """What a kernel for sequences of several lengths computes, sequence by sequence."""
    out = torch.zeros_like(q)
    for i in range(len(query_borders) - 1):
        queries, keys = (slice(int(b[i]), int(b[i + 1])) for b in (query_borders, key_borders))
        if queries.start < queries.stop:
            out[queries] = plain_attention(q[None, queries], k[None, keys], v[None, keys], None)[0].float()
    return out


def test_kernels_for_several_lengths_read_keys_and_values_where_they_lie():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 5, 2, 12, generator=generator)
    kv = torch.randn(3, 7, 2, 2, 12, generator=generator)
    mask = torch.arange(7) < torch.tensor([[7], [1], [4]])
    seen = []

    def kernel(q, k, v, *rest):
        seen.extend([k, v])
        return plain_varlen(q, k, v, *rest)

    out = _varlen(kernel, q, *kv.unbind(2), KeyMask.valid_first(mask)[0])
    torch.testing.assert_close(out.double(), plain_attention(q, *kv.unbind(2), mask), atol=1e-5, rtol=1e-5)
    assert all(tensor.untyped_storage().data_ptr() == kv.untyped_storage().data_ptr() for tensor in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", preferred_backends("cuda", torch.bfloat16, masked=True))
@pytest.mark.parametrize("masked", [False, True])
def test_every_gpu_backend_computes_softmax_attention_forwards_and_backwards(backend, masked):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 64, 2, 72), (3, 24, 2, 72), (3, 24, 2, 72)]
    tensors = [torch.randn(s, generator=generator).cuda().bfloat16().requires_grad_() for s in shapes]
    mask = torch.arange(24, device="cuda") < torch.tensor([[24], [1], [9]], device="cuda") if masked else None
    expected = plain_attention(*tensors, mask)
    expected_gradients = torch.autograd.grad(expected.square().sum(), tensors)
    out = attend(*tensors, mask, backend)
    gradients = torch.autograd.grad(out.float().square().sum(), tensors)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert (found - wanted).norm() < 2e-2 * wanted.norm()
