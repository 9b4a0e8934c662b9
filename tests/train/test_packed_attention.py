"""Attention of one product of queries, keys and values: what is read and written where it lies, and what is copied."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.errors import InputError
from tests.train.flash_attention_3_stand_in import RESULTS, StandIn, plain, standing_in
from train.model import attention as facade
from train.model import flash_attention_3
from train.model import flash_attention_3_packed as packed
from train.model.attention import packed_attention
from train.model.checkpointing import checkpointed
from train.model.long_time_attention import is_long, long_time_attention
from train.ops.reference import reference_operations
from train.ops.time_attention import time_attention

SIZES = ((2, 7, 1), (1, 7, 3), (2, 5, 3), (1, 1, 1))
"""Samples, tokens of a sequence, interleaved sequences."""


@pytest.fixture(params=RESULTS)
def kernels(request: pytest.FixtureRequest, nothing_loaded: None) -> Iterator[StandIn]:
    with standing_in(request.param) as stand_in:
        yield stand_in


@pytest.fixture
def flash_3_chosen(kernels: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(facade, "preferred_backends", lambda *_, **__: ("flash-attn-3",))
    return kernels


def product(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*size, 3, 2, 8, dtype=dtype, requires_grad=True)


def expected_of(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attention along the second dimension, and the gradient of the product."""
    own = qkv.detach().clone().requires_grad_()
    out, _ = plain(*own.transpose(1, 2).unbind(3), own.shape[-1] ** -0.5)
    out = out.transpose(1, 2)
    return out, torch.autograd.grad(out, own, grad)[0]


def storages(*tensors: Tensor) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_read_the_product_and_write_output_and_gradient_where_they_belong(
    kernels: StandIn, size: tuple[int, int, int]
) -> None:
    qkv = product(*size)
    grad = torch.randn(*size, 2, 8)
    out = packed.flash_attention_3_packed(qkv)
    (found,) = torch.autograd.grad(out, qkv, grad)
    torch.testing.assert_close((out, found), expected_of(qkv, grad))
    assert out.is_contiguous()
    assert found.is_contiguous()
    assert len(kernels.given) == len(kernels.written) == (1 if size[2] == 1 else size[0])
    for *read, to in kernels.given:
        assert storages(*read) == storages(qkv)
        assert storages(to) == storages(out)
    assert all(storages(*gradients) == storages(found) for gradients in kernels.written)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_forward_pass_is_cudnns_where_it_leaves_tokens_where_they_lie(
    kernels: StandIn, size: tuple[int, int, int]
) -> None:
    qkv = product(*size)
    grad = torch.randn(*size, 2, 8)
    out = packed.flash_attention_3_packed(qkv, by_cudnn=True)
    (found,) = torch.autograd.grad(out, qkv, grad)
    torch.testing.assert_close((out, found), expected_of(qkv, grad))
    assert out.is_contiguous()
    is_one = size[2] == 1 or size[0] == 1
    assert (len(kernels.by_cudnn), len(kernels.given)) == ((1, 0) if is_one else (0, size[0]))
    for *read, to in kernels.by_cudnn:
        assert storages(*read) == storages(qkv)
        assert storages(to) == storages(out)


def test_operators_say_of_their_results_what_a_compiler_must_know(kernels: StandIn) -> None:
    for size in SIZES:
        torch.library.opcheck(packed._packed, (product(*size), False))
        torch.library.opcheck(packed._packed, (product(*size), True))


def test_a_gradient_that_lies_elsewhere_is_put_in_order(kernels: StandIn) -> None:
    qkv = product(2, 5, 3)
    grad = torch.randn(1, 1, 1, 2, 1).expand(2, 5, 3, 2, 8)
    (found,) = torch.autograd.grad(packed.flash_attention_3_packed(qkv), qkv, grad)
    torch.testing.assert_close(found, expected_of(qkv, grad)[1])


def test_a_compiled_graph_is_not_broken(flash_3_chosen: StandIn) -> None:
    def attend(qkv: Tensor) -> Tensor:
        return packed_attention(qkv * 2)

    qkv = product(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [(out := run(qkv), *torch.autograd.grad(out.square().sum(), qkv)) for run in (attend, compiled)]
    torch.testing.assert_close(results[0], results[1])
    assert len(flash_3_chosen.given) == 2


def test_selective_checkpointing_keeps_what_it_computed(kernels: StandIn) -> None:
    for mode, times in (("selective", 1), ("full", 2)):
        kernels.given.clear()
        run = checkpointed(lambda t: packed.flash_attention_3_packed(t.sin()).exp(), mode)
        run(product(2, 5, 3)).sum().backward()
        assert len(kernels.given) == times * 2


def test_a_product_is_taken_apart_for_other_kernels_alone(
    flash_3_chosen: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, norm = product(2, 66, 3), torch.rand(8, requires_grad=True)
    long_time_attention(qkv).sum().backward()
    packed_attention(qkv[:, :, 0]).sum().backward()
    assert [len(gradients) for gradients in flash_3_chosen.written] == [3] * 3
    assert all(len(storages(*gradients)) == 1 for gradients in flash_3_chosen.written)
    flash_3_chosen.written.clear()
    long_time_attention(qkv, q_norm=norm, k_norm=norm).sum().backward()
    assert all(len(storages(*gradients)) == 3 for gradients in flash_3_chosen.written)
    monkeypatch.setattr(facade, "preferred_backends", lambda *_, **__: ("flash", "math"))
    flash_3_chosen.given.clear()
    packed_attention(qkv[:, :, 0])
    assert flash_3_chosen.given == []


def test_a_backend_that_is_missing_here_is_an_error() -> None:
    with pytest.raises(InputError, match="flash-attn-3.*not available on cpu in float32"):
        packed_attention(product(2, 5), backend="flash-attn-3")


@pytest.mark.parametrize("size", [(1, 66, 3), (2, 65, 3), (2, 70, 1)], ids=str)
@pytest.mark.parametrize(("has_norm", "has_rope"), [(False, False), (True, True), (True, False), (False, True)])
def test_attention_along_many_frames_is_that_of_plain_pytorch(
    size: tuple[int, int, int], has_norm: bool, has_rope: bool
) -> None:
    qkv = product(*size, dtype=torch.float64)
    angles = torch.rand(size[1], 4, dtype=torch.float64)
    rope = (angles.cos(), angles.sin()) if has_rope else None
    norms = [torch.rand(8, dtype=torch.float64, requires_grad=True) for _ in range(2 * has_norm)]
    grad = torch.randn(*size, 2, 8, dtype=torch.float64)
    results = []
    for attend in (long_time_attention, time_attention):
        out = attend(qkv, **dict(zip(("q_norm", "k_norm"), norms, strict=False)), rope=rope)
        results.append((out, *torch.autograd.grad(out, [qkv, *norms], grad)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)  # angles are float32


class _Operations(TorchDispatchMode):
    """Notes which operations run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


COPIES = {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::cat", "aten::stack", "aten::add.Tensor"}


def test_a_gpus_kernels_are_given_views_and_their_gradients_are_joined_once() -> None:
    """On tensors without content, whose strides are those that cuDNN's results have."""
    qkv = torch.empty(1, 66, 9, 3, 2, 72, dtype=torch.bfloat16, device="meta", requires_grad=True)
    assert is_long(qkv)
    with _Operations() as forward:
        out = long_time_attention(qkv)
    with _Operations() as backward:
        (grad,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
    assert out.is_contiguous()
    assert grad.is_contiguous()
    assert COPIES.isdisjoint(forward.names)
    assert [name for name in backward.names if name in COPIES] == ["aten::stack"]


def test_only_long_sequences_of_a_gpu_go_past_the_kernels_and_not_what_they_are_measured_against() -> None:
    long, short = (torch.empty(1, T, 9, 3, 2, 72, dtype=torch.bfloat16, device="meta") for T in (65, 64))
    assert is_long(long)
    assert not is_long(short)
    assert not is_long(torch.empty(1, 65, 1, 3, 2, 72))
    with reference_operations():
        assert not is_long(long)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1, 130, 5), (2, 70, 3), (2, 200, 1)], ids=str)
@pytest.mark.parametrize("backend", ["cudnn", "flash-attn-3", None])
def test_on_a_gpu_long_sequences_are_right_and_nothing_is_put_in_order(
    size: tuple[int, int, int], backend: facade.AttentionBackend | None
) -> None:
    if backend == "flash-attn-3" and not flash_attention_3.usable(torch.device("cuda", 0)):
        pytest.skip("FlashAttention 3 is not installed, or the GPU is no Hopper")
    torch.manual_seed(0)
    qkv = torch.randn(*size, 3, 4, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(*size, 4, 72, device="cuda", dtype=torch.bfloat16)
    out = long_time_attention(qkv, backend=backend)
    (found,) = torch.autograd.grad(out, qkv, grad)
    assert out.is_contiguous()
    assert found.is_contiguous()
    for result, right in zip((out, found), expected_of(qkv.double(), grad.double()), strict=True):
        assert (result - right).norm() < 1e-2 * right.norm()
